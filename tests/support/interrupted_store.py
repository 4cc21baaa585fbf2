"""A store in which somebody else does something whole just before the n-th call: races by enumeration."""

import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from storage.memory import MemoryStore
from storage.object_store import ObjectInfo, ObjectStore


class InterruptedStore(MemoryStore):
    """Counts calls from 1; at 0 nothing interrupts. Safe to use from many threads."""

    def __init__(self, at: int, interlude: Callable[[ObjectStore], None]) -> None:
        super().__init__()
        self._at = at
        self._interlude = interlude
        self._turns = threading.Lock()
        self.calls = 0

    def put(self, key: str, body: bytes | Path) -> None:
        self._turn()
        super().put(key, body)

    def create(self, key: str, body: bytes) -> bool:
        self._turn()
        return super().create(key, body)

    def get(self, key: str) -> bytes:
        self._turn()
        return super().get(key)

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        self._turn()
        return super().list(prefix, after)

    def delete(self, keys: Iterable[str]) -> None:
        self._turn()
        super().delete(keys)

    def _turn(self) -> None:
        with self._turns:
            self.calls += 1
            now = self.calls == self._at
        if now:  # outside of the lock: the interlude calls the store, too
            self._interlude(self)
