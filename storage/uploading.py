"""Brings the files of checkpoints to the store: packed where that takes less time, and each only once.

What was acknowledged of a checkpoint is remembered until it is committed, and what was packed is kept on the
disk until it was sent: publishing it again after an error sends what is missing, under the same keys, in the
same form. How fast the link is, is known from the uploads that were.
"""

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from . import layout, packing
from .errors import Corrupt
from .local import (
    DISK_UNUSABLE,
    LocalCheckpoint,
    regular_file,
    temporary_dir,
    unreadable,
    verify,
)
from .object_store import ObjectStore
from .records import StoredFile
from .tensor_header import element_width

MIN_PACKED_BYTES = 1 << 16
"""A smaller file is sent as it is: the request costs more than its bytes. It says nothing about the link."""
KEPT = 2
"""Of so many checkpoints it is remembered what was sent: the one on its way, and the newest."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What the uploads so far say about the way to the store; each counts half as much as the next."""

    sent_bytes: float = 0.0
    seconds: float = 0.0

    @property
    def bytes_s(self) -> float | None:
        return self.sent_bytes / self.seconds if self.seconds > 0 else None

    def after(self, sent_bytes: int, seconds: float) -> "Link":
        return Link(sent_bytes=self.sent_bytes / 2 + sent_bytes, seconds=self.seconds / 2 + seconds)


Identity = tuple[int, int, int]


@dataclass(slots=True)
class _Work:
    """What is done for one checkpoint."""

    scratch: Path | None = None
    prepared: dict[str, tuple[Identity, StoredFile]] = field(default_factory=dict)
    """Files as they are sent, as they were when this was decided."""
    sent: set[str] = field(default_factory=set)
    claimed: dict[str, str] = field(default_factory=dict)
    """Which file may be packed under a name."""
    tried: set[str] = field(default_factory=set)
    """Keys that a put was begun of."""


class Uploader:
    """Uploads files of checkpoints. Threads may upload different checkpoints at the same time.

    Args:
        monotonic: Seconds, to measure the link by.
    """

    def __init__(self, store: ObjectStore, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._works: dict[str, _Work] = {}
        self._ratios: dict[str, float] = {}
        self.link = Link()
        self.sent_bytes = 0
        """Sent in all, as far as the store has acknowledged it."""

    def upload(
        self, local: LocalCheckpoint, files: Iterable[StoredFile], prefix: str
    ) -> tuple[StoredFile, ...]:
        """Make sure that files of a checkpoint are in the store; return them as they lie there.

        Raises:
            Corrupt: A file is not what its record states.
            InvalidName: A name or a tensor file is refused.
            AccessDenied, Unavailable: Not all of them are there: call again.
        """
        work = self._work(prefix)
        taken = layout.paths_of(file.name for file in local.manifest.files)
        return tuple(self._upload(local.path, file, prefix, work, taken) for file in files)

    def forget(self, prefix: str) -> None:
        """Drop what was kept for a checkpoint: it is committed, or given up."""
        with self._lock:
            work = self._works.pop(prefix, None)
        _clear(work)

    def expected_s(self, files: Iterable[StoredFile], prefix: str) -> float | None:
        """How long it will take to send what is missing of these files; None before anything was measured."""
        rate = self.link.bytes_s
        if rate is None:
            return None
        work = self._works.get(prefix) or _Work()
        missing = (file for file in files if file.name not in work.sent)
        return sum(file.size_bytes * self._ratios.get(file.name, 1.0) for file in missing) / rate

    def _work(self, prefix: str) -> _Work:
        with self._lock:
            work = self._works.setdefault(prefix, _Work())
            outdated = [self._works.pop(old) for old in list(self._works)[:-KEPT]]
        for old in outdated:
            _clear(old)
        return work

    def _upload(
        self, directory: Path, file: StoredFile, prefix: str, work: _Work, taken: Collection[str]
    ) -> StoredFile:
        """Upload one file, making sure that it is the file of the manifest before and during the upload."""
        path = directory / file.name
        try:
            before = _identity(path)
            known, stored = work.prepared.get(file.name, (None, file))
            if known != before:
                stored = self._prepared(directory, file, prefix, work, taken)
                work.prepared[file.name] = before, stored
                work.sent.discard(file.name)
            if file.name in work.sent:
                return stored
            if not stored.packed:
                verify(directory, [file])
            body = _packed_path(work, stored) if stored.packed else path
            self._put(prefix + layout.stored_name(stored), body, stored, work)
            changed = _identity(path) != before
        except OSError as error:
            work.prepared.pop(file.name, None)
            raise unreadable(path, error) from error
        if changed:
            work.prepared.pop(file.name, None)
            raise Corrupt(f"{path}: changed while it was uploaded")
        work.sent.add(file.name)
        if stored.packed:
            body.unlink(missing_ok=True)
        return stored

    def _put(self, key: str, body: Path, stored: StoredFile, work: _Work) -> None:
        layout.check_path(key)
        size = stored.packed.size_bytes if stored.packed else stored.size_bytes
        first_try = key not in work.tried
        work.tried.add(key)
        began = self._monotonic()
        self._store.put(key, body)
        elapsed_s = self._monotonic() - began
        with self._lock:
            self.sent_bytes += size
            self._ratios[stored.name] = size / stored.size_bytes if stored.size_bytes else 1.0
            # Of one that failed before, the store may have most: how long the rest took says nothing.
            if first_try and size >= MIN_PACKED_BYTES:
                self.link = self.link.after(size, elapsed_s)

    def _prepared(
        self, directory: Path, file: StoredFile, prefix: str, work: _Work, taken: Collection[str]
    ) -> StoredFile:
        """Pack a file if that pays and its key is free then; return it as it is to be sent.

        Raises:
            Corrupt, InvalidName, OSError: About the file itself. A disk without room to pack is no error.
        """
        if file.size_bytes < MIN_PACKED_BYTES:
            return file
        with regular_file(directory, file.name) as source:
            width = element_width(source, directory / file.name)
            packed_name = layout.packed_name(file.name, packing.codec_of(width))
            free = layout.is_free(prefix, packed_name, taken)
            if not free or work.claimed.setdefault(packed_name.casefold(), file.name) != file.name:
                return file
            if not packing.measure(source, width).pays(self.link.bytes_s):
                return file
            try:
                work.scratch = work.scratch or temporary_dir(directory.parent)
                target = _packed_path(work, file)
                source.seek(0)
                packed = packing.pack(source, target, file, width)
            except OSError as error:
                if error.errno not in DISK_UNUSABLE:
                    raise
                logger.warning("%s is sent as it is: no room to pack it: %s", file.name, error.strerror)
                _clear(work)
                return file
        if packed.size_bytes > packing.MAX_RATIO * file.size_bytes:
            target.unlink()
            return file
        return file.model_copy(update={"packed": packed})


def _packed_path(work: _Work, file: StoredFile) -> Path:
    """Where a packed file lies until it is sent; named by its digest, for its name may have directories."""
    assert work.scratch is not None
    return work.scratch / file.sha256


def _clear(work: _Work | None) -> None:
    if work and work.scratch:
        shutil.rmtree(work.scratch, ignore_errors=True)
        work.scratch = None


def _identity(path: Path) -> Identity:
    status = os.stat(path, follow_symlinks=False)
    return status.st_ino, status.st_size, status.st_mtime_ns
