"""A store that dies, or loses a reply, at its n-th call: crash consistency by enumeration, not by luck."""

import threading
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import TypeVar

from storage.errors import Unavailable
from storage.object_store import ObjectInfo, ObjectStore

T = TypeVar("T")


class Died(BaseException):
    """The process is gone. Not an ``Exception``: no code under test may catch it and go on."""


class Fault(Enum):
    """What happens at the n-th call."""

    DIE_BEFORE = "the process dies before the call has its effect"
    DIE_AFTER = "the process dies after the call had its effect"
    DIE_HALF_WAY = "the process dies in a call that deletes several objects, after half of them"
    LOSE_REPLY = "the call has its effect and raises Unavailable"
    REFUSE = "the call has no effect and raises Unavailable"


class FlakyStore:
    """Passes calls on to ``inner``, except the n-th, counted from 1, and all after it if the process died."""

    def __init__(self, inner: ObjectStore, at: int, fault: Fault) -> None:
        self._inner = inner
        self._at = at
        self._fault = fault
        self.calls = 0
        self._counting = threading.Lock()
        self.dead = False

    @property
    def url(self) -> str:
        return self._inner.url

    def put(self, key: str, body: bytes | Path) -> None:
        self._call(lambda: self._inner.put(key, body))

    def create(self, key: str, body: bytes) -> bool:
        return self._call(lambda: self._inner.create(key, body))

    def get(self, key: str) -> bytes:
        return self._call(lambda: self._inner.get(key))

    def download(self, key: str, target: Path) -> None:
        self._call(lambda: self._inner.download(key, target))

    def head(self, key: str) -> ObjectInfo | None:
        return self._call(lambda: self._inner.head(key))

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        return iter(self._call(lambda: tuple(self._inner.list(prefix, after))))

    def delete(self, keys: Iterable[str]) -> None:
        doomed = tuple(keys)
        half = tuple(islice(doomed, len(doomed) // 2))
        self._call(lambda: self._inner.delete(doomed), lambda: self._inner.delete(half))

    def abort_uploads(self, prefix: str) -> int:
        return self._call(lambda: self._inner.abort_uploads(prefix))

    def unfinished(self, prefix: str) -> Iterator[ObjectInfo]:
        return iter(self._call(lambda: tuple(self._inner.unfinished(prefix))))

    def _call(self, effect: Callable[[], T], half: Callable[[], object] = lambda: None) -> T:
        with self._counting:
            self.calls += 1
            number = self.calls
        if self.dead:
            raise Died
        if number != self._at:
            return effect()
        match self._fault:
            case Fault.DIE_BEFORE:
                pass
            case Fault.DIE_AFTER:
                effect()
            case Fault.DIE_HALF_WAY:
                half()
            case Fault.LOSE_REPLY:
                effect()
                raise Unavailable("the reply was lost")
            case Fault.REFUSE:
                raise Unavailable("the store did not answer")
        self.dead = True
        raise Died
