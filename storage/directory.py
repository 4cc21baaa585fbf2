"""A store that is a folder: the default on a laptop, or a shared file system with working ``link(2)``.

Every object is written to a temporary file, flushed to the disk, and only then given its name: by ``link``,
which fails if the name is taken (``create``), or by ``rename``, which replaces (``put``). A reader sees all
of an object or none of it, also after a power cut.
"""

import contextlib
import errno
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from . import layout
from .errors import (
    AccessDenied,
    InvalidName,
    NotFound,
    StorageError,
    Unavailable,
)
from .object_store import ObjectInfo

_STAGING = ".tmp"
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EOPNOTSUPP}
_BAD_NAME = {errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}
_MKDIR_TRIES = 20
_CHUNK_BYTES = 1 << 20
LITTER_S = 86400.0
"""An unfinished file that nobody wrote to for so long was left by a writer that died."""


class DirectoryStore:
    """An ``ObjectStore`` over the files under one directory, which is made when something is first written.

    Symlinks below the root are never followed: what they point to may lie outside.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self._tidied = False

    @property
    def root(self) -> Path:
        return self._root

    @property
    def url(self) -> str:
        return self._root.as_uri()

    def put(self, key: str, body: bytes | Path) -> None:
        target = self._path(key)
        with self._translated(key, writing=True), self._staged(body) as temporary:
            self._place(target, lambda: os.replace(temporary, target))

    def create(self, key: str, body: bytes) -> bool:
        target = self._path(key)
        with self._translated(key, writing=True), self._staged(body) as temporary:
            try:
                self._place(target, lambda: os.link(temporary, target))
            except FileExistsError:
                return False
        return True

    def get(self, key: str) -> bytes:
        with (
            self._translated(key),
            self._open(key) as descriptor,
            open(descriptor, "rb", closefd=False) as file,
        ):
            return file.read()

    def download(self, key: str, target: Path) -> None:
        with (
            self._translated(key),
            self._open(key) as descriptor,
            open(descriptor, "rb", closefd=False) as source,
            _writing(target),
            target.open("wb") as file,
        ):
            shutil.copyfileobj(source, file, _CHUNK_BYTES)

    def head(self, key: str) -> ObjectInfo | None:
        try:
            with self._translated(key), self._open(key) as descriptor:
                return ObjectInfo(key, os.fstat(descriptor).st_size)
        except NotFound:
            return None

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        # The deepest directory that the prefix names; the rest of it begins a file or directory name.
        parent = prefix.rpartition("/")[0]
        if parent:
            self._path(parent)
        with self._translated(prefix):
            found = [info for info in self._walk(parent, after) if info.key.startswith(prefix)]
        # Directory order is not key order: "a-b" comes before "a/b".
        yield from sorted(found, key=lambda info: info.key)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            path = self._path(key)
            with self._translated(key), contextlib.suppress(FileNotFoundError, NotADirectoryError):
                self._check_parents(path)
                path.unlink()
                _fsync(path.parent)
            for parent in path.parents:
                if parent == self._root or not _removed_if_empty(parent):
                    break

    def abort_uploads(self, prefix: str) -> int:
        return 0  # unfinished files have no key yet; the next writers remove them

    def unfinished(self, prefix: str) -> Iterator[ObjectInfo]:
        return iter(())

    def _path(self, key: str) -> Path:
        layout.check_path(key)
        if key.split("/")[0] == _STAGING:
            raise InvalidName(f"key {key!r}: {_STAGING!r} is where {self.url} keeps unfinished files")
        return self._root / key

    @contextlib.contextmanager
    def _staged(self, body: bytes | Path) -> Iterator[Path]:
        """Yield a durable temporary file with the body; remove it afterwards unless it was renamed."""
        staging = self._root / _STAGING
        staging.mkdir(parents=True, exist_ok=True)
        if not self._tidied:
            self._tidied = True
            _remove_litter(staging)
        temporary = staging / secrets.token_hex(12)
        try:
            with temporary.open("xb") as file:
                if isinstance(body, Path):
                    with body.open("rb") as source:
                        shutil.copyfileobj(source, file, _CHUNK_BYTES)
                else:
                    file.write(body)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _place(self, target: Path, place: Callable[[], object]) -> None:
        """Give a staged file its name, durably."""
        for attempt in range(_MKDIR_TRIES):
            self._make_parents(target)
            try:
                place()
                _fsync(target.parent)
                return
            except FileNotFoundError:
                # A concurrent delete took the directory while it was empty.
                if attempt == _MKDIR_TRIES - 1:
                    raise

    def _make_parents(self, path: Path) -> None:
        for directory in self._parents(path):
            try:
                os.mkdir(directory)
                _fsync(directory.parent)
            except FileExistsError:
                _refuse_symlink(directory)
            except FileNotFoundError:
                return  # taken by a concurrent delete; the next try makes it again

    def _check_parents(self, path: Path) -> None:
        for directory in self._parents(path):
            _refuse_symlink(directory)

    def _parents(self, path: Path) -> tuple[Path, ...]:
        """The directories between the root and a path, outermost first, without the root."""
        inner = path.relative_to(self._root).parents
        return tuple(self._root / parent for parent in reversed(inner) if parent != Path())

    @contextlib.contextmanager
    def _open(self, key: str) -> Iterator[int]:
        path = self._path(key)
        try:
            self._check_parents(path)
            # Not blocking: a pipe in place of a file must not hang the reader.
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except NotADirectoryError as error:
            raise FileNotFoundError(errno.ENOENT, error.strerror, str(path)) from error
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise FileNotFoundError(errno.ENOENT, "not a file", str(path))
            yield descriptor
        finally:
            os.close(descriptor)

    def _walk(self, directory: str, after: str = "") -> Iterator[ObjectInfo]:
        """Every object under a directory, which is "" or a relative path, with a greater key; in no order."""
        path = self._root / directory
        try:
            self._check_parents(path / "x")
            entries = list(os.scandir(path))
        except (FileNotFoundError, NotADirectoryError):
            return  # deleted meanwhile, or never written
        for entry in entries:
            key = f"{directory}/{entry.name}" if directory else entry.name
            if entry.is_dir(follow_symlinks=False) and key != _STAGING:
                yield from self._walk(key, after)
            elif key > after and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(FileNotFoundError):
                    found = entry.stat(follow_symlinks=False)
                    yield ObjectInfo(key, found.st_size, found.st_mtime)

    @contextlib.contextmanager
    def _translated(self, key: str, *, writing: bool = False) -> Iterator[None]:
        what = f"{key} in {self.url}" if key else self.url
        try:
            yield
        except StorageError:
            raise
        except FileNotFoundError as error:
            if writing:
                raise Unavailable(f"{what}: {error}") from error
            raise NotFound(f"{what}: no such object") from error
        except OSError as error:
            raise _translate(error, what) from error


def _translate(error: OSError, what: str) -> StorageError:
    reason = error.strerror or str(error)
    if error.errno in _DENIED:
        return AccessDenied(f"{what}: {reason}. The folder must be writable and support hard links.")
    if error.errno in _BAD_NAME:
        return InvalidName(f"{what}: {reason}")
    return Unavailable(f"{what}: {reason}")


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Blame the local file, not the object, for what goes wrong with the file."""
    try:
        yield
    except OSError as error:
        if error.filename == str(target) or error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise Unavailable(f"{target}: {error.strerror or error}") from error
        raise


def _refuse_symlink(path: Path) -> None:
    if stat.S_ISLNK(path.lstat().st_mode):
        raise InvalidName(f"{path}: is a symlink, which a store does not follow")


def _remove_litter(staging: Path) -> None:
    """Remove what writers that died have left. A clock that is wrong costs one ``put`` another try."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(staging):
            with contextlib.suppress(OSError):
                if time.time() - entry.stat(follow_symlinks=False).st_mtime > LITTER_S:
                    os.unlink(entry.path)


def _removed_if_empty(directory: Path) -> bool:
    try:
        directory.rmdir()
    except OSError:
        return False
    return True


def _fsync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
