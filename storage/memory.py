"""A store in this process's memory: for tests and for trying things out. Gone with the process."""

import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from . import layout
from .errors import NotFound
from .object_store import ObjectInfo


class MemoryStore:
    """An ``ObjectStore`` over a dict. Atomic, and safe to use from many threads."""

    def __init__(self, name: str = "") -> None:
        self._name = name
        self._objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"memory://{self._name}"

    def put(self, key: str, body: bytes | Path) -> None:
        layout.check_path(key)
        content = body.read_bytes() if isinstance(body, Path) else bytes(body)
        with self._lock:
            self._objects[key] = content

    def create(self, key: str, body: bytes) -> bool:
        layout.check_path(key)
        with self._lock:
            if key in self._objects:
                return False
            self._objects[key] = body
            return True

    def get(self, key: str) -> bytes:
        layout.check_path(key)
        try:
            return self._objects[key]
        except KeyError:
            raise NotFound(f"{key} in {self.url}: no such object") from None

    def download(self, key: str, target: Path) -> None:
        target.write_bytes(self.get(key))

    def head(self, key: str) -> ObjectInfo | None:
        layout.check_path(key)
        body = self._objects.get(key)
        return None if body is None else ObjectInfo(key, len(body))

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        with self._lock:
            found = [
                ObjectInfo(key, len(body))
                for key, body in self._objects.items()
                if key.startswith(prefix) and key > after
            ]
        yield from sorted(found, key=lambda info: info.key)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            with self._lock:
                self._objects.pop(layout.check_path(key), None)

    def abort_uploads(self, prefix: str) -> int:
        return 0

    def unfinished(self, prefix: str) -> Iterator[ObjectInfo]:
        return iter(())
