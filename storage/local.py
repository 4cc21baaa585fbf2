"""Checkpoint directories on a node's own disk.

A checkpoint is complete exactly when a directory ``step-000000100`` with a valid ``manifest.json`` exists:
it is written under a temporary name, its files are hashed and flushed to the disk, and then it is renamed.
A process may die at any point without a reader ever seeing half a checkpoint.

    with staged_checkpoint(root, 100, metrics={"loss": 0.1}, final=False) as directory:
        (directory / "adapter.safetensors").write_bytes(…)
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from . import layout
from .errors import Corrupt, InvalidName, StorageError, Unavailable
from .records import MAX_RECORD_BYTES, Packed, StoredFile
from .tensor_header import SUFFIX, check_header

MANIFEST = "manifest.json"
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""No space left, no inodes left, or a quota reached: room may be made."""
_NOT_THERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})
DISK_UNUSABLE = DISK_FULL | {errno.EROFS}
MAX_LISTING_BYTES = MAX_RECORD_BYTES * 4 // 5
"""What the files of one checkpoint may take in its manifest and its record."""
MAX_SAID_BYTES = MAX_RECORD_BYTES * 9 // 10
"""What its files and its metrics may take together: the rest is for what a record says besides."""
_TEMPORARY = ".tmp-"
_STEP_DIR = re.compile(r"step-(\d{9})")
_CHUNK_BYTES = 1 << 20
_LISTED_BYTES = len(
    StoredFile(
        name="",
        size_bytes=10**15,
        sha256="0" * 64,
        packed=Packed(codec="z" * 32, size_bytes=10**15, sha256="0" * 64),
    ).model_dump_json()
)
"""What a file takes in a record besides its name."""


class Manifest(BaseModel):
    """What a checkpoint directory contains."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    version: Literal[1] = 1
    step: Annotated[int, Field(ge=0, lt=10**9)]
    final: bool
    metrics: dict[str, float]
    files: tuple[StoredFile, ...]


@dataclass(frozen=True, slots=True)
class LocalCheckpoint:
    """A complete checkpoint directory."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def final(self) -> bool:
        return self.manifest.final


def step_dir(step: int) -> str:
    """The name of a checkpoint's directory."""
    return f"step-{step:09d}"


def temporary_dir(parent: Path) -> Path:
    """Make a directory that no reader looks into and ``remove_stale`` removes."""
    path = parent / f"{_TEMPORARY}{secrets.token_hex(8)}"
    path.mkdir(parents=True)
    return path


@contextlib.contextmanager
def staged_checkpoint(root: Path, step: int, *, metrics: Mapping[str, float], final: bool) -> Iterator[Path]:
    """Yield a directory to write a checkpoint's files into; it becomes complete when the block ends.

    If the block raises, nothing remains. A complete checkpoint of the same step is replaced, unless its
    contents are the same.

    Args:
        metrics: Numbers known at this step. One that is not finite is left out: JSON cannot say it, and a
            metric that is missing never makes a checkpoint the best.

    Raises:
        InvalidName: The block wrote a symlink, a device, or what ``check_listing`` refuses.
        OSError: The disk is full or read-only; nothing remains.
    """
    temporary = temporary_dir(root)
    try:
        yield temporary
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        files = hash_files(temporary, metrics=finite)
        manifest = Manifest(step=step, final=final, metrics=finite, files=files)
        seal(temporary, manifest, root / step_dir(step))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def seal(temporary: Path, manifest: Manifest, target: Path) -> None:
    """Make a written directory complete: manifest, fsync, rename, fsync of the parent."""
    (temporary / MANIFEST).write_text(manifest.model_dump_json())
    _fsync_tree(temporary)
    with contextlib.suppress(OSError):  # one that cannot be read is replaced
        existing = read_checkpoint(target)
        if existing and existing.manifest == manifest:
            return
    if target.exists():
        remove(target)
    os.rename(temporary, target)
    fsync_path(target.parent)


def hash_files(directory: Path, *, metrics: Mapping[str, float]) -> tuple[StoredFile, ...]:
    """Size and sha256 of every file under a directory, in name order.

    Raises:
        InvalidName: Something in it is neither a regular file nor a directory, or ``check_listing`` refuses
            it; nothing was read then.
    """
    names = sorted(_files(directory))
    check_listing(directory, names, metrics)
    return tuple(_stored(directory, name) for name in names)


def check_listing(directory: Path, names: Sequence[str], metrics: Mapping[str, float]) -> None:
    """Refuse a checkpoint that could be written and uploaded, but never read again.

    Its record is measured as if every file were packed, which says more: who writes a checkpoint does not
    know how its files will be sent.

    Raises:
        InvalidName: A name is refused by ``layout.check_files`` or is the manifest's, there are so many
            files or metrics that no record can hold them, or one is a safetensors file that ``check_header``
            refuses.
    """
    layout.check_files(names)
    if taken := [name for name in names if name.casefold() == MANIFEST]:
        raise InvalidName(
            f"{directory / taken[0]}: {MANIFEST} is the name of what states the checkpoint's files: "
            "write it under another name"
        )
    listing_bytes = sum(_LISTED_BYTES + len(json.dumps(name)) for name in names)
    if listing_bytes > MAX_LISTING_BYTES:
        raise InvalidName(
            f"{directory}: {len(names)} files, whose names and digests take {listing_bytes} bytes "
            f"of a record, at most {MAX_LISTING_BYTES}: write fewer, larger files"
        )
    metrics_bytes = len(json.dumps(dict(metrics)))
    if listing_bytes + metrics_bytes > MAX_SAID_BYTES:
        raise InvalidName(
            f"{directory}: {len(metrics)} metrics and {len(names)} files take "
            f"{listing_bytes + metrics_bytes} bytes of a record, at most {MAX_SAID_BYTES}: log fewer metrics"
        )
    for name in names:
        if name.endswith(SUFFIX):
            with regular_file(directory, name) as file:
                check_header(file, directory / name)


def complete_checkpoints(root: Path) -> list[LocalCheckpoint]:
    """The complete checkpoints in a directory, newest first. Temporary and torn ones are not there.

    Raises:
        OSError: See ``read_checkpoint``.
    """
    return list(newest_first(root))


def newest_first(root: Path) -> Iterator[LocalCheckpoint]:
    """``complete_checkpoints``, each read when it is asked for: one that cannot be hides no newer one."""
    try:
        paths = sorted(root.iterdir(), reverse=True)
    except FileNotFoundError:
        return
    for path in paths:
        if checkpoint := read_checkpoint(path):
            yield checkpoint


def read_checkpoint(path: Path) -> LocalCheckpoint | None:
    """A complete checkpoint directory, or None if this is not one.

    Raises:
        OSError: That cannot be told now, see ``unreadable``: a good checkpoint must not be taken for none.
    """
    named = _STEP_DIR.fullmatch(path.name)
    file = path / MANIFEST
    if not named or path.is_symlink():
        return None
    try:
        status = file.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_RECORD_BYTES:
            return None
        manifest = Manifest.model_validate_json(file.read_bytes())
    except ValidationError:
        return None
    except OSError as error:
        if error.errno in _NOT_THERE:
            return None
        raise
    return LocalCheckpoint(path, manifest) if manifest.step == int(named[1]) else None


def free_superseded(root: Path, keep: int) -> int:
    """Remove all but the newest ``keep`` complete checkpoints; return how many went."""
    superseded = complete_checkpoints(root)[keep:]
    for checkpoint in superseded:
        remove(checkpoint.path)
    return len(superseded)


def size_of(checkpoint: LocalCheckpoint) -> int:
    return sum(file.size_bytes for file in checkpoint.manifest.files)


def verify(path: Path, files: Iterable[StoredFile]) -> None:
    """Check that a directory holds these files, byte for byte.

    Raises:
        Corrupt: A file is missing, a symlink, or has another size or sha256. The message names it.
        Unavailable: A file cannot be read now: that says nothing about its bytes.
    """
    for file in files:
        layout.check_path(file.name, "file name")
        try:
            actual = _stored(path, file.name)
        except OSError as error:
            raise unreadable(path / file.name, error) from error
        except InvalidName as error:
            raise Corrupt(str(error)) from error
        if actual.size_bytes != file.size_bytes:
            raise Corrupt(
                f"{path / file.name}: {actual.size_bytes} bytes, its record says {file.size_bytes}. "
                "Use an earlier checkpoint."
            )
        if actual.sha256 != file.sha256:
            raise Corrupt(
                f"{path / file.name}: sha256 is {actual.sha256[:12]}, its record says {file.sha256[:12]}. "
                "Use an earlier checkpoint."
            )


def unreadable(path: Path, error: OSError) -> StorageError:
    """What a file that cannot be read means: it is not there, or, with every other error, try again later.

    Too many open files, a disk that fails to answer or permissions are this machine's trouble: a good
    checkpoint must not be given up for them.
    """
    kind = Corrupt if error.errno in _NOT_THERE else Unavailable
    return kind(f"{error.filename or path}: {error.strerror or error}")


def remove(path: Path) -> None:
    """Remove a checkpoint directory: first from sight, by a rename, then from the disk."""
    hidden = path.parent / f"{_TEMPORARY}{secrets.token_hex(8)}"
    try:
        os.rename(path, hidden)
    except FileNotFoundError:
        return
    shutil.rmtree(hidden, ignore_errors=True)


def remove_stale(root: Path) -> None:
    """Remove what a killed process left half written. Call it only while nobody writes here."""
    if root.is_dir():
        for path in root.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(path, ignore_errors=True)


def fsync_path(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_tree(root: Path) -> None:
    for directory, _, names in os.walk(root, topdown=False):
        for name in names:
            fsync_path(Path(directory, name))
        fsync_path(Path(directory))


def _files(root: Path) -> Iterator[str]:
    """Names of the files under a directory, relative to it."""
    for directory, directories, names in os.walk(root):
        for name in (*directories, *names):
            path = Path(directory, name)
            mode = path.lstat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise InvalidName(f"{path}: a checkpoint holds regular files only, no symlinks or devices")
            if stat.S_ISREG(mode):
                yield path.relative_to(root).as_posix()


def _stored(root: Path, name: str) -> StoredFile:
    """Size and digest of one file."""
    with regular_file(root, name) as file:
        digest, size = _digest(file)
    return StoredFile(name=name, size_bytes=size, sha256=digest)


@contextlib.contextmanager
def regular_file(root: Path, name: str) -> Iterator[BinaryIO]:
    """Open one file of a checkpoint without following a symlink at any part of its name.

    Raises:
        InvalidName: It is a symlink, or no regular file.
        OSError
    """
    for part in Path(name).parents:
        if (root / part).is_symlink():
            raise InvalidName(f"{root / part}: a checkpoint holds no symlinks")
    try:
        # Not blocking: a pipe in place of a file must not hang the reader.
        descriptor = os.open(root / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if (root / name).is_symlink():
            raise InvalidName(f"{root / name}: a checkpoint holds no symlinks") from error
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InvalidName(f"{root / name}: not a regular file")
        with open(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def _digest(file: BinaryIO) -> tuple[str, int]:
    """The sha256 and the length of what is left of a file."""
    digest, size = hashlib.sha256(), 0
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
        size += len(chunk)
    return digest.hexdigest(), size
