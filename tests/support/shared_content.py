"""A dataset as sweeps share it: written, submitted, collected, and read again."""

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from support.flaky_store import Fault, FlakyStore

from storage import layout
from storage.content.state import Listing
from storage.content.store import Identity, LocalContent, content_log, fetch, store_for
from storage.object_store import ObjectStore
from storage.records import StoredFile

T = TypeVar("T")

FILES = {"a.png": b"image one", "b/c.png": b"image two", "d.txt": b"image one", "metadata.jsonl": b"{}" * 40}


class SharedFlakyStore(FlakyStore):
    """A flaky store that many threads may call: one at a time."""

    def __init__(self, inner: ObjectStore, at: int, fault: Fault) -> None:
        super().__init__(inner, at, fault)
        self._lock = threading.Lock()

    def _call(self, effect: Callable[[], T], half: Callable[[], object] = lambda: None) -> T:
        with self._lock:
            return super()._call(effect, half)


def written(folder: Path, files: dict[str, bytes]) -> LocalContent:
    for name, body in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(body)
    listing = Listing(
        files=tuple(
            StoredFile(name=name, size_bytes=len(body), sha256=hashlib.sha256(body).hexdigest())
            for name, body in files.items()
        )
    )
    paths = {name: folder / name for name in files}
    return LocalContent(
        listing=listing, paths=paths, identities={name: Identity.of(path) for name, path in paths.items()}
    )


def submit(store: ObjectStore, local: LocalContent, sweep: str = "cat") -> None:
    """What ``orchestrate sweep`` does, in its order."""
    key = layout.sweep_spec(sweep)
    store_for(store, sweep, local, submitted=store.head(key) is not None)
    store.create(key, b"{}")
    store_for(store, sweep, local, submitted=True)


def sweeps(store: ObjectStore) -> set[str]:
    return {parsed[1] for info in store.list("sweeps/") if (parsed := layout.parse_spec(info.key))}


def assert_readable(store: ObjectStore, digest: str, target: Path) -> None:
    stored = content_log(store, digest).refresh().readable
    assert stored is not None
    fetch(store, digest, stored, target)
    found = {p.relative_to(target).as_posix(): p.read_bytes() for p in target.rglob("*") if p.is_file()}
    assert found == FILES
