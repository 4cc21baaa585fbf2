"""What probes have found, for a day: a cache in a file of this user, whose loss costs a probe, no more.

An answer holds for one endpoint, one bucket and one user of it. These are kept as a digest, so the file names
no credentials; a line of it cannot speak for any other place. A server on this machine is never remembered:
another one may listen on its port tomorrow.

Dying at any point leaves the old file or the new one. Of two processes that write at once one is forgotten.
"""

import contextlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

DAY_S = 24 * 3600.0
_MAX_BYTES = 1 << 20


class Remembered(BaseModel):
    """One probe's answer."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    atomic: bool
    reason: str = Field(max_length=500)
    at: float
    """When it was found, in seconds since 1970."""


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_: Literal[1] = Field(1, alias="schema")
    probes: Mapping[str, Remembered] = {}


def recall(identity: str, now: float) -> Remembered | None:
    """Return what was found of a place in the last day; None if nothing was."""
    return _fresh(_read(), now).get(identity)


def remember(identity: str, found: Remembered) -> None:
    """Keep an answer, and drop those that are too old. A disk that takes no file is no error."""
    kept = {**_fresh(_read(), found.at), identity: found}
    body = _File(schema=1, probes=kept).model_dump_json(by_alias=True).encode()
    path = cache_file()
    new = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(body)
            os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)


def cache_file() -> Path:
    """Where the answers are kept."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(chosen) if os.path.isabs(chosen) else Path(os.path.expanduser("~")) / ".cache"
    return root / "orchestrate" / "probes.json"


def _read() -> Mapping[str, Remembered]:
    """Return what the file says; nothing, if it is missing, damaged, or of another version."""
    try:
        with cache_file().open("rb") as file:
            return _File.model_validate_json(file.read(_MAX_BYTES)).probes
    except (OSError, ValidationError):
        return {}


def _fresh(probes: Mapping[str, Remembered], now: float) -> dict[str, Remembered]:
    # What comes from the future was written under another clock: it says nothing about its age.
    return {place: found for place, found in probes.items() if 0 <= now - found.at < DAY_S}
