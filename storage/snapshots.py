"""Snapshots in the store: what long logs, or those of many runs, said when somebody last read them.

    sweeps/<sweep>/snapshot.json.zst     of all runs of a sweep: its next controller starts from it
    runs/<run>/snapshot.json.zst         of one run whose log is long: whoever resumes it starts from it

Both are written by the sweep's controller and hold the same: a line with the format, the code that folded
the states and the digest of the rest, then compressed JSON. They are a cache. Deleting one costs time; one
that is damaged, too large, or from a version that may fold logs in another way, is ignored; and ``Log`` drops
one that its log does not follow from. Only of runs that are over and tidy is the log itself not asked again.
"""

import hashlib
import inspect
import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

import zstandard
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from . import layout, records, run_state
from .errors import NotFound, StorageError
from .log import (
    RunLog,
    RunSnapshot,
    Snapshot,
    run_log,
)
from .object_store import ObjectStore
from .records import Sha256
from .run_state import RunState

FORMAT = 1
MAX_STORED_BYTES = 64 << 20
"""A larger object is refused unread."""
MAX_JSON_BYTES = 512 << 20
"""What claims to unpack to more is refused."""
LONG = 64
"""A run gets a snapshot of its own each time that its log has grown by so many entries."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What a sweep's snapshot says of one run."""

    snapshot: RunSnapshot
    tidy: bool = False
    """The run is over, and what it left behind is deleted."""


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    next_seq: Annotated[int, Field(ge=1)]
    digest: Sha256
    tidy: bool
    state: RunState


_STORED: TypeAdapter[dict[str, _Stored]] = TypeAdapter(dict[str, _Stored])


def encode(known: Mapping[str, Known]) -> bytes:
    """Return the bytes of a snapshot.

    Raises:
        ValueError: They are more than anybody would read.
    """
    stored = {
        run_id: _Stored(
            next_seq=one.snapshot.next_seq,
            digest=one.snapshot.digest,
            tidy=one.tidy,
            state=one.snapshot.state,
        )
        for run_id, one in known.items()
    }
    plain = _STORED.dump_json(stored)
    packed = zstandard.ZstdCompressor().compress(plain)
    if len(plain) > MAX_JSON_BYTES or len(packed) > MAX_STORED_BYTES - 200:
        raise ValueError(f"{len(plain)} bytes, {len(packed)} packed, are too many for a snapshot")
    return b" ".join((*_HEADER, _digest(packed))) + b"\n" + packed


def decode(body: bytes) -> dict[str, Known]:
    """Return what a snapshot says.

    Raises:
        ValueError: It is damaged, or of another version.
    """
    header, _, packed = body.partition(b"\n")
    *version, digest = header[:200].split(b" ")
    if tuple(version) != _HEADER:
        raise ValueError("it is not of this version")
    if digest != _digest(packed):
        raise ValueError("it is damaged")
    try:
        if not 0 <= zstandard.frame_content_size(packed) <= MAX_JSON_BYTES:
            raise ValueError(f"it unpacks to more than {MAX_JSON_BYTES} bytes")
        stored = _STORED.validate_json(zstandard.ZstdDecompressor().decompress(packed))
    except (zstandard.ZstdError, ValidationError) as error:
        raise ValueError(f"it does not say what a snapshot says ({type(error).__name__})") from error
    return {
        run_id: Known(
            snapshot=Snapshot(next_seq=one.next_seq, digest=one.digest, state=one.state), tidy=one.tidy
        )
        for run_id, one in stored.items()
    }


def read_sweep(store: ObjectStore, sweep: str) -> dict[str, Known]:
    """Return what the sweep's snapshot says, by run; nothing if there is none that can be used.

    Two requests, however many runs there are.

    Raises:
        Unavailable, AccessDenied
    """
    return _read(store, layout.sweep_snapshot(sweep))


def write_sweep(store: ObjectStore, sweep: str, known: Mapping[str, Known]) -> None:
    """Replace the sweep's snapshot.

    Raises:
        ValueError: See ``encode``.
        Unavailable, AccessDenied
    """
    store.put(layout.sweep_snapshot(sweep), encode(known))


def read_run(store: ObjectStore, run_id: str) -> RunSnapshot | None:
    """Return a run's own snapshot; None if there is none that can be used, for whatever reason."""
    try:
        known = _read(store, layout.run_snapshot(run_id)).get(run_id)
    except StorageError as error:
        logger.info("%s: reading its log without a snapshot: %s", run_id, error)
        return None
    return known.snapshot if known else None


def write_run(store: ObjectStore, run_id: str, snapshot: RunSnapshot) -> None:
    """Replace a run's own snapshot.

    Raises:
        ValueError, Unavailable, AccessDenied: See ``write_sweep``.
    """
    store.put(layout.run_snapshot(run_id), encode({run_id: Known(snapshot=snapshot)}))


def hinted_log(store: ObjectStore, run_id: str) -> RunLog:
    """The log of a run, which looks for the run's own snapshot when it is first read."""
    find: Callable[[], RunSnapshot | None] = lambda: read_run(store, run_id)  # noqa: E731
    return run_log(store, run_id, hint=find)


def _read(store: ObjectStore, key: str) -> dict[str, Known]:
    info = store.head(key)
    if info is None:
        return {}
    try:
        if info.size_bytes > MAX_STORED_BYTES:
            raise ValueError(f"{info.size_bytes} bytes are more than {MAX_STORED_BYTES}")
        return decode(store.get(key))
    except NotFound:
        return {}
    except ValueError as error:
        logger.warning("%s in %s: ignored, logs are read instead: %s", key, store.url, error)
        return {}


def _digest(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest().encode()


def _folded_by() -> str:
    """Name the code that folds: a state is only as good as the code that made it, and that changes."""
    try:
        sources = "".join(inspect.getsource(module) for module in (records, run_state))
    except OSError:  # installed without its sources: what another process wrote is then never used
        return secrets.token_hex(8)
    return hashlib.sha256(sources.encode()).hexdigest()[:16]


_HEADER = (b"orchestrate-snapshot", str(FORMAT).encode(), _folded_by().encode())
