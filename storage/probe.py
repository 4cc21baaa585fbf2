"""Finds out what a store really does, before anything depends on it.

Whether create-only has exactly one winner shows only in a race: some servers ignore ``If-None-Match``, and
some honour it in sequence but let several concurrent writers win. ``open_probed`` is how a process that will
write logs opens a store; what was found is remembered for a day (``probe_memory``).
"""

import secrets
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from . import probe_memory
from .errors import Corrupt, NotFound, StorageError
from .object_store import ObjectStore
from .url import open_store


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """Whether many writers may append to logs in this store, and why."""

    atomic: bool
    reason: str
    age_s: float | None = None
    """How long ago this was found, if it was not found just now."""

    @property
    def when(self) -> str:
        """The end of a line that tells the result: empty, or "; probed 3 h ago"."""
        if self.age_s is None:
            return ""
        minutes = int(self.age_s / 60)
        return f"; probed {f'{minutes // 60} h' if minutes >= 60 else f'{minutes} min'} ago"


def open_probed(url: str) -> tuple[ObjectStore, ProbeResult]:
    """Open a store for writing logs, knowing whether its create-only holds.

    Where it does not, this process checks before it writes, and must be the only one that appends.

    Raises:
        InvalidName, AccessDenied, Unavailable
    """
    store = open_store(url)
    identity = _identity(url)
    found = probe_memory.recall(identity, time.time()) if identity else None
    if found:
        probed = ProbeResult(found.atomic, found.reason, time.time() - found.at)
    else:
        probed = probe_anew(store, url)
    return (store if probed.atomic else open_store(url, check_then_put=True)), probed


def probe_anew(store: ObjectStore, url: str) -> ProbeResult:
    """Race for what a store does, whatever is remembered of it, and remember that instead."""
    probed = race_probe(store)
    if identity := _identity(url):
        found = probe_memory.Remembered(atomic=probed.atomic, reason=probed.reason, at=time.time())
        probe_memory.remember(identity, found)
    return probed


def _identity(url: str) -> str | None:
    """What an answer about this store holds for; None where a probe costs too little to be remembered."""
    if not url.lower().startswith("s3://"):
        return None
    from .s3.place import identity  # botocore takes long to import, and a folder needs none of it

    return identity(url)


def race_probe(store: ObjectStore, rounds: int = 8, writers: int = 16) -> ProbeResult:
    """Race concurrent creates on fresh keys; what was written is deleted again.

    The defaults make luck unlikely: of 400 rounds of 16 writers on a Swift, whose create-only is not atomic,
    27 % had one winner, so about one probe in 40,000 would be taken in.

    Raises:
        AccessDenied, Unavailable: The store could not be probed.
    """
    with _scratch(store) as keys:
        for round_number in range(1, rounds + 1):
            key = next(keys)
            bodies = [secrets.token_bytes(64) for _ in range(writers)]
            won = _race(store, key, bodies)
            problem = _judge(store, key, won, bodies)
            if problem:
                return ProbeResult(False, f"{problem} (round {round_number} of {rounds})")
    return ProbeResult(True, f"one winner of {writers} in each of {rounds} races")


def write_check(store: ObjectStore) -> None:
    """Put, read, list and delete a small object, as any use of the store will.

    Raises:
        StorageError: The first step that failed, by its name, with the store's own reason.
    """
    body = secrets.token_bytes(64)
    with _scratch(store) as keys:
        key = next(keys)
        with _step("write to"):
            store.put(key, body)
        with _step("read from"):
            if store.get(key) != body:
                raise Corrupt(f"{key} in {store.url}: read back other bytes than were written")
        with _step("list"):
            if [info.key for info in store.list(key)] != [key]:
                raise NotFound(f"{key} in {store.url}: was written, but a listing does not show it")
        with _step("delete from"):
            store.delete([key])
            if store.head(key) is not None:
                raise Corrupt(f"{key} in {store.url}: was deleted, but is still there")


def _race(store: ObjectStore, key: str, bodies: list[bytes]) -> list[bool | StorageError]:
    """Create one key from a thread for each body, all at once; return whether each was told that it won."""
    ready = threading.Barrier(len(bodies))

    def create(body: bytes) -> bool | StorageError:
        ready.wait()
        try:
            return store.create(key, body)
        except StorageError as error:
            return error

    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(create, bodies))


def _judge(store: ObjectStore, key: str, won: list[bool | StorageError], bodies: list[bytes]) -> str | None:
    winners = won.count(True)
    if winners > 1:
        return f"{winners} of {len(won)} concurrent creates of one key succeeded"
    for outcome in won:
        if isinstance(outcome, StorageError):
            # Servers that cannot race also fail under it; without two winners that proves nothing.
            raise outcome
    if winners == 0:
        return f"none of {len(won)} concurrent creates of one key succeeded"
    winner = bodies[won.index(True)]
    if store.get(key) != winner:
        return "the stored object is not the winner's"
    if store.create(key, b"too late"):
        return "a create of a taken key succeeded"
    if store.get(key) != winner:
        return "a refused create replaced the object"
    return None


@contextmanager
def _scratch(store: ObjectStore) -> Iterator[Iterator[str]]:
    """Yield fresh keys, and delete what was written to them."""
    prefix = f"probe/{uuid.uuid4()}/"
    used: list[str] = []

    def fresh() -> Iterator[str]:
        while True:
            used.append(f"{prefix}{len(used)}")
            yield used[-1]

    failed = True
    try:
        yield fresh()
        failed = False
    finally:
        try:
            store.delete(used)
        except StorageError:
            # What went wrong first says more.
            if not failed:
                raise


@contextmanager
def _step(verb: str) -> Iterator[None]:
    try:
        yield
    except StorageError as error:
        raise type(error)(f"cannot {verb} the store: {error}") from error
