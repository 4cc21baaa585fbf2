"""Content on a node's own disk: fetched once for all of its agents, kept until its room is needed.

    <folder>/<digest>/files/…        the content; the directory appears by rename, whole and verified
    <folder>/<digest>/meta.json      sizes of its files; when it was last used is the file's time of change
    <folder>/.tmp-<digest>/          a fetch under way, or one that was killed: the next one continues it
    <folder>/.locks/<digest>         held shared by whoever uses the content, exclusively by who changes it

Locks are the kernel's: they end with the process that holds them, however it ends. What is in use is never
deleted, so the size limit bounds what is kept for later and never stops an attempt.
"""

import contextlib
import errno
import fcntl
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .. import layout
from ..errors import Unavailable
from .state import Listing

MAX_KEPT_BYTES = 50_000_000_000
"""The default limit, unless half of what the disk could give is less."""
LOCK_PATIENCE_S = 120.0
"""How long a damaged copy that others use is waited for."""
_PAUSE_S = 0.2
_META = "meta.json"

Wait = Callable[[float], bool]
"""Waits for so many seconds; True if it is no use waiting on."""


@dataclass(frozen=True, slots=True)
class _Kept:
    digest: str
    path: Path
    size_bytes: int
    used_at_ns: int


class ContentCache:
    """A folder of contents, shared by every process of the node."""

    def __init__(self, folder: Path, limit_bytes: int | None = None) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes

    @contextlib.contextmanager
    def hold(
        self, digest: str, size_bytes: int, fetch: Callable[[Path], Listing], wait: Wait
    ) -> Iterator[Path]:
        """Yield where a content lies, a folder or a file. Nobody deletes it within the block.

        Args:
            fetch: Downloads the content into a directory, which may hold what an earlier fetch left.
            wait: How to wait for another process that is fetching the same.

        Raises:
            Unavailable: The disk is full or unusable, or waiting was given up.
        """
        layout.content_prefix(digest)  # it becomes a path: refuse anything but a digest
        with contextlib.ExitStack() as held:
            with self._translated():  # not what the caller's block raises
                lock = held.enter_context(self._locked(digest))
                self._make_whole(lock, digest, size_bytes, fetch, wait)
                meta = self._folder / digest / _META
                os.utime(meta)
                place = meta.parent / "files" / json.loads(meta.read_bytes())["root"]
            yield place

    def _make_whole(
        self, lock: int, digest: str, size_bytes: int, fetch: Callable[[Path], Listing], wait: Wait
    ) -> None:
        """Have the content, and its lock shared."""
        give_up = time.monotonic() + LOCK_PATIENCE_S
        while True:
            _wait_for(lock, fcntl.LOCK_SH, wait, f"content {digest[:12]} is being fetched")
            if self._is_whole(digest):
                return
            if not _try(lock, fcntl.LOCK_EX):  # which has cost us the shared lock
                if time.monotonic() > give_up:
                    raise Unavailable(f"{self._folder / digest} is damaged, and other attempts use it")
                _pause(wait, _PAUSE_S * (1 + random.random()), "waiting was given up")
            elif not self._is_whole(digest):
                self._fetch(digest, size_bytes, fetch)

    def _fetch(self, digest: str, size_bytes: int, fetch: Callable[[Path], Listing]) -> None:
        """Fetch under the exclusive lock."""
        target, temporary = self._folder / digest, self._folder / f".tmp-{digest}"
        self._remove(target)
        (temporary / "files").mkdir(parents=True, exist_ok=True)
        self._make_room(digest, size_bytes - _size(temporary))
        listing = fetch(temporary / "files")
        sizes = {file.name: file.size_bytes for file in listing.files}
        meta = {"root": listing.root, "size_bytes": listing.size_bytes, "files": sizes}
        (temporary / _META).write_text(json.dumps(meta))
        with (temporary / _META).open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)

    def _is_whole(self, digest: str) -> bool:
        """Whether the copy is there, and nobody took away or cut a file of it."""
        folder = self._folder / digest
        try:
            meta = json.loads((folder / _META).read_bytes())
            return all((folder / "files" / n).stat().st_size == size for n, size in meta["files"].items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False

    def _make_room(self, digest: str, need_bytes: int) -> None:
        """Delete what was not used for longest, until the new content fits.

        Raises:
            Unavailable: The disk has no room for it.
        """
        kept = [content for content in self._kept() if content.digest != digest]
        used = sum(content.size_bytes for content in kept)
        free = shutil.disk_usage(self._folder).free
        limit = self._limit_bytes
        if limit is None:
            limit = min(MAX_KEPT_BYTES, (used + free) // 2)
        for content in sorted(kept, key=lambda content: content.used_at_ns):
            if used + need_bytes <= limit and need_bytes <= free:
                break
            if self._evict(content):
                used, free = used - content.size_bytes, shutil.disk_usage(self._folder).free
        if need_bytes > free:
            raise Unavailable(
                f"{self._folder}: no space left: content {digest[:12]} needs {need_bytes / 1e9:.1f} GB more, "
                f"the disk has {free / 1e9:.1f} GB; free some, or put the cache on another disk"
            )

    def _kept(self) -> Iterator[_Kept]:
        for path in self._folder.iterdir():
            digest = path.name.removeprefix(".tmp-")
            if len(digest) != 64:
                continue
            size_bytes, used_at_ns = 0, 0
            try:
                size_bytes = int(json.loads((path / _META).read_bytes())["size_bytes"])
                used_at_ns = (path / _META).stat().st_mtime_ns
            except (OSError, ValueError, KeyError, TypeError):  # half fetched, half deleted or damaged
                size_bytes = _size(path)
            yield _Kept(digest, path, size_bytes, used_at_ns)

    def _evict(self, content: _Kept) -> bool:
        with self._locked(content.digest) as lock:
            if not _try(lock, fcntl.LOCK_EX):
                return False
            self._remove(content.path)
            return True

    def _remove(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            (path / _META).unlink()  # first: what is half deleted must not count as whole
        shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def _locked(self, digest: str) -> Iterator[int]:
        """Open the lock of a content, without locking it yet."""
        locks = self._folder / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        lock = os.open(locks / digest, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            yield lock
        finally:
            os.close(lock)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise Unavailable(f"{error.filename or self._folder}: no space left on the disk") from error
            raise Unavailable(f"{error.filename or self._folder}: {error.strerror or error}") from error


def _try(lock: int, how: int) -> bool:
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait_for(lock: int, how: int, wait: Wait, why: str) -> None:
    while not _try(lock, how):
        _pause(wait, _PAUSE_S, why)


def _pause(wait: Wait, pause_s: float, why: str) -> None:
    if wait(pause_s):
        raise Unavailable(f"{why}; the attempt was asked to stop")


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.lstat().st_size if path.is_file() else 0
    return total
