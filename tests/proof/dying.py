"""An owner of a run, and a garbage collector, that die at a named point of the crash matrix.

``live`` takes the run from step 20 to step 30, ``collect`` retires and deletes step 10, ``claim`` begins the
next attempt; each up to where it is to die. ``live_and_exit`` is the same as a process that is really gone:
nothing is cleaned up, no ``finally`` runs.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from pathlib import Path
from typing import NoReturn

from support.runs import RUN, claimed, contents, ended, incarnation, ref

from storage.checkpoints import CheckpointStore
from storage.ledger import Ledger
from storage.local import read_checkpoint, staged_checkpoint, step_dir
from storage.log import run_log
from storage.object_store import ObjectInfo, ObjectStore
from storage.url import open_store

KILLED = 137
Die = Callable[[], NoReturn]


class Death(Enum):
    """The points of the crash matrix at which a process dies, by their numbers there."""

    SNAPSHOT = 1
    LOCAL_WRITE = 2
    STAGED = 3
    UPLOADING = 4
    UPLOADED = 5
    COMMIT_SENT = 6
    COMMITTED = 7
    CLAIMED = 10
    RETIRED = 11
    DELETING = 12

    @property
    def on_disk(self) -> bool:
        """Whether it leaves something on the node's disk that an exception would clean up."""
        return self in {Death.SNAPSHOT, Death.LOCAL_WRITE, Death.STAGED}


class DyingStore:
    """Passes calls on until the one at which its user dies."""

    def __init__(self, inner: ObjectStore, death: Death, die: Die) -> None:
        self._inner = inner
        self._death = death
        self._die = die
        self._puts = 0

    @property
    def url(self) -> str:
        return self._inner.url

    def put(self, key: str, body: bytes | Path) -> None:
        self._puts += 1
        if self._death is Death.UPLOADING and self._puts == 2:
            self._die()
        self._inner.put(key, body)

    def create(self, key: str, body: bytes) -> bool:
        if self._death is Death.UPLOADED:
            self._die()
        created = self._inner.create(key, body)
        if self._death in {Death.COMMIT_SENT, Death.CLAIMED, Death.RETIRED}:
            self._die()
        return created

    def get(self, key: str) -> bytes:
        return self._inner.get(key)

    def download(self, key: str, target: Path) -> None:
        self._inner.download(key, target)

    def head(self, key: str) -> ObjectInfo | None:
        return self._inner.head(key)

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        return self._inner.list(prefix, after)

    def delete(self, keys: Iterable[str]) -> None:
        first, *others = keys
        self._inner.delete([first])
        if self._death is Death.DELETING:
            self._die()
        self._inner.delete(others)

    def abort_uploads(self, prefix: str) -> int:
        return self._inner.abort_uploads(prefix)

    def unfinished(self, prefix: str) -> Iterator[ObjectInfo]:
        return self._inner.unfinished(prefix)


def live(store: ObjectStore, ledger: Ledger, disk: Path, death: Death, die: Die) -> None:
    """What the process does that is to die: attempt 1 at step 30, a collector, or the claim of attempt 2."""
    checkpoints = CheckpointStore(store, RUN, ledger)
    state = ledger.refresh()
    match death:
        case Death.CLAIMED:
            ledger.append(claimed(2))
        case Death.RETIRED | Death.DELETING:
            after = checkpoints.retire([ref(10)])
            assert after
            checkpoints.reap(after)
        case _:
            train(disk, death, die)
            local = read_checkpoint(disk / step_dir(30))
            assert local
            checkpoints.publish(local, state.attempt, incarnation(state.attempt))
    die()


def train(disk: Path, death: Death, die: Die) -> None:
    """Write the checkpoint of step 30."""
    if death is Death.SNAPSHOT:
        die()
    with staged_checkpoint(disk, 30, metrics={}, final=False) as directory:
        for name, body in contents(30).items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(body)
            if death is Death.LOCAL_WRITE:
                die()
    if death is Death.STAGED:
        die()


def live_and_exit(url: str, disk: Path, death: Death) -> None:
    """For a process of its own: live, and be gone without a word."""
    store = open_store(url)
    if death is Death.CLAIMED:
        run_log(store, RUN).append(ended(1))
    dying = DyingStore(store, death, _exit)
    live(dying, run_log(dying, RUN), disk, death, _exit)


def _exit() -> NoReturn:
    os._exit(KILLED)


def fetch_and_exit(url: str, disk: Path) -> None:
    """For a process of its own: be gone when the first of two files is downloaded."""

    class Cut(DyingStore):
        def download(self, key: str, target: Path) -> None:
            super().download(key, target)
            _exit()

    store = Cut(open_store(url), Death.SNAPSHOT, _exit)
    ledger = run_log(store, RUN)
    CheckpointStore(store, RUN, ledger).fetch_newest(ledger.refresh(), disk)
