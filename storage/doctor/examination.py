"""Finds out, before any GPU is paid for, whether a store will do, and says what to do where it will not.

``examine`` yields one ``Check`` after the other. Nothing is remembered or assumed: each is tried on the
store, under a prefix of its own, and all that was written is deleted at the end, also when the examination
is stopped. What a process leaves that is killed here lies under ``probe/``, where nothing reads.
"""

import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from ..errors import (
    AccessDenied,
    Corrupt,
    InvalidName,
    NotFound,
    StorageError,
    Unavailable,
)
from ..url import open_store
from . import checks
from .checks import Bench, Finding

CHECKPOINT_BYTES = 300_000_000
"""About the state of a rank 16 LoRA of SDXL with AdamW in fp32."""


class Cause(StrEnum):
    """What kind of thing is wrong, as far as a program should care."""

    UNREACHABLE = "unreachable"
    DENIED = "denied"
    WRONG = "wrong"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What one check of a store has found."""

    name: str
    ok: bool | None
    """None: not tried, or it does not apply."""
    said: str
    todo: str = ""
    """What a person should do; a check that is ok and has it is a warning."""
    cause: Cause | None = None
    figures: Mapping[str, float] = field(default_factory=dict)


def examine(
    url: str,
    *,
    announce: Callable[[str], None] = lambda name: None,
    now: Callable[[], float] = time.time,
    checkpoint_bytes: int = CHECKPOINT_BYTES,
) -> Iterator[Check]:
    """Check a store, one thing after the other.

    Args:
        announce: Called with the name of each check before it begins.
        now: This machine's clock, in seconds since 1970.
        checkpoint_bytes: What a checkpoint takes on the disk: two must fit.

    Raises:
        InvalidName: The url is none of a store.
    """
    bench = Bench(open_store(url), url, f"probe/doctor-{uuid.uuid4()}/", now, checkpoint_bytes)
    failed: list[Check] = []
    try:
        for name, check, needs in _PLAN:
            announce(name)
            missing = next((one for one in failed if one.name in needs), None)
            if missing:
                found = Check(name=name, ok=None, said=f"not tried, because of {missing.name!r}")
            else:
                found = _tried(name, check, bench)
            if found.ok is False:
                failed.append(found)
            yield found
    finally:
        announce("cleaning up")
        left = bench.clear() if not any(check.name == "reach" for check in failed) else None
    if left is not None:
        todo = f"delete what is under {bench.prefix} by hand"
        yield Check(name="clean up", ok=False, said=str(left), todo=todo, cause=_cause(left))


_PLAN: tuple[tuple[str, Callable[[Bench], Finding], tuple[str, ...]], ...] = (
    ("reach", checks.reach, ()),
    ("clock", checks.clock, ()),
    ("write and read", checks.write_and_read, ("reach",)),
    ("list after write", checks.list_after_write, ("reach", "write and read")),
    ("delete", checks.delete, ("reach", "write and read")),
    ("create-only", checks.create_only, ("reach", "write and read", "delete")),
    ("multipart", checks.multipart, ("reach", "write and read", "delete")),
    ("checksums", checks.checksums, ("reach", "write and read", "delete")),
    ("latency", checks.latency, ("reach", "write and read", "delete")),
    ("throughput", checks.throughput, ("reach", "write and read", "delete")),
    ("disk", checks.disk, ()),
)


def _tried(name: str, check: Callable[[Bench], Finding], bench: Bench) -> Check:
    try:
        found = check(bench)
    except StorageError as error:
        return Check(name=name, ok=False, said=str(error), todo=_todo(error, bench), cause=_cause(error))
    return Check(
        name=name,
        ok=found.ok,
        said=found.said,
        todo=found.todo,
        cause=Cause.WRONG if found.ok is False else None,
        figures=found.figures,
    )


def _cause(error: StorageError) -> Cause:
    match error:
        case AccessDenied():
            return Cause.DENIED
        case Unavailable():
            return Cause.UNREACHABLE
        case _:
            return Cause.WRONG


def _todo(error: StorageError, bench: Bench) -> str:
    match error:
        case AccessDenied() | Unavailable() | InvalidName() if not bench.in_bucket:
            return "name a folder that can be made and written to, on a disk with room; see the path above"
        case AccessDenied() if "NoSuchBucket" in str(error):
            return "create the bucket, or correct its name in the store's url"
        case AccessDenied():
            return "check the bucket's name and the credentials: they must allow to put, get, list and delete"
        case Unavailable():
            return "check the endpoint in the url, the network and the server, then try again"
        case Corrupt() | NotFound():
            return "use another store: what is written here is not what is read"
        case InvalidName():
            return "correct the store's url"
        case _:
            return ""
