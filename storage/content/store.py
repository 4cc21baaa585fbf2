"""Datasets and base models in the store: each uploaded once, named by its digest, shared by every sweep.

``store_for`` uploads what is not there, file by file, and then says so in the content's log. An upload that
was cut off is continued once all its large files have arrived; else a new one begins beside it. ``fetch``
trusts nothing but the digest: the listing must have it, and each file must be what the listing says. Deleting
takes two records, see ``state``: a process may die at any point, and whoever comes next finishes or begins
anew.
"""

import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from .. import layout
from ..errors import (
    Corrupt,
    Fenced,
    InvalidName,
    StorageError,
    Unavailable,
)
from ..log import Log
from ..object_store import FETCH_TRIES, ObjectInfo, ObjectStore
from ..records import StoredFile
from ..s3.etag import is_of_file
from .state import (
    CONTENT_ENTRY,
    ContentRecord,
    ContentState,
    Listing,
    Reaped,
    Retired,
    Stored,
    Unreferenced,
    Used,
    fold,
    holds,
    listing_digest,
    reapable,
    refusal,
)

T = TypeVar("T")

ContentLog = Log[ContentState, ContentRecord]

MAX_LISTING_BYTES = 64_000_000
_TRIES = 5
_AT_ONCE = 8
_IN_MEMORY_BYTES = 16_000_000
"""Files up to this size are sent as the very bytes that were hashed."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a file's directory entry says: while it stays the same, so do the bytes."""

    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> "Identity":
        status = path.stat()
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalContent:
    """A content on this machine: its files, where each of them lies, and what they were when hashed."""

    listing: Listing
    paths: Mapping[str, Path]
    identities: Mapping[str, Identity]

    @property
    def digest(self) -> str:
        return listing_digest(self.listing)


def content_log(
    store: ObjectStore, digest: str, *, sleep: Callable[[float], None] = time.sleep
) -> ContentLog:
    """The log of one content. Nothing is read before the first ``refresh`` or ``append``."""
    return Log(
        store,
        layout.content_log_prefix(digest),
        entry=CONTENT_ENTRY,
        initial=ContentState(),
        fold=fold,
        refusal=refusal,
        holds=holds,
        sleep=sleep,
    )


def store_for(
    store: ObjectStore,
    sweep: str,
    local: LocalContent,
    *,
    submitted: bool,
    on_sent: Callable[[int], None] = lambda size_bytes: None,
    clock: Callable[[], float] = time.time,
) -> bool:
    """Make sure that a content is in the store and may not be deleted while the sweep exists.

    Args:
        submitted: The sweep exists, so that a use that it recorded before still counts.
        on_sent: Told the size of each file that is in the store from now on.

    Returns:
        Whether anything was uploaded.

    Raises:
        InvalidName: A file's name is refused, or there are too many files; nothing was sent.
        Corrupt: A file changed while it was read.
        Unavailable, AccessDenied
    """
    layout.check_files(file.name for file in local.listing.files)
    body = _listing_body(local)
    digest, uploaded = local.digest, False
    log = content_log(store, digest)
    log.refresh()
    for _ in range(_TRIES):
        if log.state.live is None:
            uploaded = True
            _upload(store, log, digest, local, body, on_sent, clock)
            continue
        live = log.state.live
        if submitted and any(user.sweep == sweep for user in live.users):
            return uploaded
        used = Used(incarnation=live.incarnation, sweep=sweep, claim=secrets.token_hex(4), at=clock())
        with contextlib.suppress(Fenced):  # it was retired meanwhile: upload it anew
            log.append(used)
            return uploaded
    raise Unavailable(
        f"content {digest[:12]} in {store.url}: deleted again whenever it was stored; is gc running?"
    )


def fetch(
    store: ObjectStore,
    digest: str,
    stored: Stored,
    target: Path,
    stopped: Callable[[], bool] = lambda: False,
) -> Listing:
    """Download a content into a directory. Files that are there already, from a fetch that was cut off, stay.

    Args:
        stopped: Asked before each file whether to go on.

    Raises:
        Corrupt: The store's bytes are not what the digest names, also when fetched again.
        NotFound: A file is not in the store (any more).
        Unavailable: The store does not answer, the disk is full, or the fetch was stopped.
        AccessDenied
    """
    listing = read_listing(store, digest, stored)

    def fetch_one(file: StoredFile) -> None:
        if stopped():
            raise Unavailable(f"content {digest[:12]}: the fetch was stopped")
        _fetch_file(store, layout.content_file(digest, stored.incarnation, file.sha256), file, target)

    try:
        for folder in {(target / file.name).parent for file in listing.files}:
            folder.mkdir(parents=True, exist_ok=True)
        for _ in _side_by_side(fetch_one, listing.files):
            pass
    except OSError as error:
        raise Unavailable(f"{error.filename or target}: {error.strerror or error}") from error
    return listing


def read_listing(store: ObjectStore, digest: str, stored: Stored) -> Listing:
    """Return the names of a content's files, having checked that they have the digest.

    Raises:
        Corrupt, NotFound, Unavailable, AccessDenied
    """
    key = layout.content_listing(digest, stored.incarnation)
    info = store.head(key)
    if info and info.size_bytes > MAX_LISTING_BYTES:
        raise Corrupt(f"{key} in {store.url}: {info.size_bytes} bytes is too large for a listing")
    body = store.get(key)
    if hashlib.sha256(body).hexdigest() != stored.listing:
        raise Corrupt(f"{key} in {store.url}: its sha256 is not what the log says")
    try:
        listing = Listing.model_validate_json(body)
    except ValidationError as error:
        raise Corrupt(f"{key} in {store.url}: not a listing that this version understands") from error
    layout.check_files(file.name for file in listing.files)
    if listing_digest(listing) != digest:
        raise Corrupt(f"{key} in {store.url}: its files are not those of {digest[:12]}")
    return listing


def incarnations(store: ObjectStore, digest: str) -> dict[str, int]:
    """Return the bytes that lie in the store of each incarnation of a content."""
    found: dict[str, int] = {}
    for info in store.list(layout.content_data_prefix(digest)):
        parsed = layout.parse_content(info.key)
        if parsed and parsed[1]:
            found[parsed[1]] = found.get(parsed[1], 0) + info.size_bytes
    return found


def retire(log: ContentLog, what: Unreferenced, *, clock: Callable[[], float] = time.time) -> bool:
    """Say that an incarnation may be deleted; False if somebody has come to use it meanwhile."""
    try:
        log.append(Retired(incarnation=what.incarnation, claims=what.claims, at=clock()))
    except Fenced:
        return False
    return True


def reap(
    store: ObjectStore,
    digest: str,
    log: ContentLog,
    existing: Collection[str],
    *,
    only: Collection[str] | None = None,
    clock: Callable[[], float] = time.time,
) -> int:
    """Delete the data of retired incarnations, and what late writers left of those reaped before.

    Args:
        existing: See ``reapable``.
        only: The incarnations whose grace is over; None: all.

    Returns:
        How many objects were deleted.
    """
    count = 0
    for upload in reapable(log.refresh(), existing):
        if only is None or upload.incarnation in only:
            count += _delete(store, digest, upload.incarnation)
            log.append(Reaped(incarnation=upload.incarnation, at=clock()))
    late = log.state.reaped & incarnations(store, digest).keys()
    return count + sum(_delete(store, digest, incarnation) for incarnation in late)


def _listing_body(local: LocalContent) -> bytes:
    body = local.listing.model_dump_json().encode()
    if len(body) > MAX_LISTING_BYTES:
        raise InvalidName(
            f"content {local.digest[:12]}: the names and digests of its {len(local.paths)} files take "
            f"{len(body)} bytes, at most {MAX_LISTING_BYTES}: split it, or use fewer, larger files"
        )
    return body


def _upload(
    store: ObjectStore,
    log: ContentLog,
    digest: str,
    local: LocalContent,
    body: bytes,
    on_sent: Callable[[int], None],
    clock: Callable[[], float],
) -> None:
    """Upload an incarnation, or the rest of one, and record it. One that was given up meanwhile stays so."""
    unfinished = sorted(incarnations(store, digest).keys() - log.state.condemned)
    incarnation, missing = _continued(store, digest, unfinished, local)
    try:
        _send_files(store, digest, incarnation, local, missing, on_sent)
    except Corrupt:
        with contextlib.suppress(Fenced):  # an object may hold other bytes than its name says
            log.append(Retired(incarnation=incarnation, at=clock()))
        raise
    store.put(layout.content_listing(digest, incarnation), body)
    stored = Stored(
        incarnation=incarnation,
        listing=hashlib.sha256(body).hexdigest(),
        files=len(local.listing.files),
        size_bytes=local.listing.size_bytes,
        at=clock(),
    )
    with contextlib.suppress(Fenced):  # somebody else stored it first, or this one was given up: look again
        log.append(stored)


def _continued(
    store: ObjectStore, digest: str, unfinished: Iterable[str], local: LocalContent
) -> tuple[str, frozenset[str]]:
    """Return the incarnation to upload to, and the digests of the files that it lacks.

    Another submission may be at work on an unfinished one, and record it at any moment. So only what was
    hashed as it is sent goes there: a large file that changes on its way would damage what is live by then.
    """
    files = _distinct(local)

    def lacks(incarnation: str) -> frozenset[str]:
        there = {info.key: info for info in store.list(layout.content_data_prefix(digest, incarnation))}

        def is_there(file: StoredFile) -> bool:
            info = there.get(layout.content_file(digest, incarnation, file.sha256))
            return _is_there(info, file, local.paths[file.name], local.identities[file.name])

        found = zip(files.values(), _side_by_side(is_there, files.values()), strict=True)
        return frozenset(file.sha256 for file, arrived in found if not arrived)

    for incarnation in unfinished:
        missing = lacks(incarnation)
        if all(files[sha256].size_bytes <= _IN_MEMORY_BYTES for sha256 in missing):
            return incarnation, missing
    return secrets.token_hex(4), frozenset(files)


def _send_files(
    store: ObjectStore,
    digest: str,
    incarnation: str,
    local: LocalContent,
    missing: Collection[str],
    on_sent: Callable[[int], None],
) -> None:
    def send(file: StoredFile) -> int:
        if file.sha256 in missing:
            key = layout.content_file(digest, incarnation, file.sha256)
            _send(store, key, file, local.paths[file.name], local.identities[file.name])
        return file.size_bytes

    for size_bytes in _side_by_side(send, _distinct(local).values()):
        on_sent(size_bytes)


def _distinct(local: LocalContent) -> dict[str, StoredFile]:
    return {file.sha256: file for file in local.listing.files}


def _side_by_side(call: Callable[[StoredFile], T], files: Iterable[StoredFile]) -> Iterator[T]:
    """Yield what a call says of each file, in order. After an error no further call is begun."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            yield from pool.map(call, files)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _is_there(info: ObjectInfo | None, file: StoredFile, path: Path, identity: Identity) -> bool:
    """Whether an object, from a try that was cut off, is known to be the file.

    The bytes of a small one were hashed before they were sent. A large file may have changed while it was,
    and whoever sent it may have died before saying so: its size alone says nothing.
    """
    if info is None or info.size_bytes != file.size_bytes:
        return False
    if file.size_bytes <= _IN_MEMORY_BYTES:
        return True
    try:
        return is_of_file(info.etag, path) and Identity.of(path) == identity
    except OSError:
        return False  # sending it says what is wrong with it


def _send(store: ObjectStore, key: str, file: StoredFile, path: Path, identity: Identity) -> None:
    """Upload a file under its digest.

    Raises:
        Corrupt: It is not what it was when it was hashed. Nobody will find what was sent of it: the caller
            gives the incarnation up.
    """
    try:
        if file.size_bytes <= _IN_MEMORY_BYTES:
            body = path.read_bytes()
            unchanged = hashlib.sha256(body).hexdigest() == file.sha256
            if unchanged:
                store.put(key, body)
        else:
            try:
                store.put(key, path)
            except StorageError as error:
                if Identity.of(path) != identity:
                    raise _changed(path) from error
                raise
            unchanged = Identity.of(path) == identity
    except OSError as error:
        raise Corrupt(f"{path}: {error.strerror or error}") from error
    if not unchanged:
        raise _changed(path)


def _changed(path: Path) -> Corrupt:
    return Corrupt(f"{path}: changed while it was being uploaded; leave it alone and try again")


def _fetch_file(store: ObjectStore, key: str, file: StoredFile, target: Path) -> None:
    path = target / file.name
    if _is_file(path, file):
        return
    for _ in range(FETCH_TRIES):
        store.download(key, path)
        if _is_file(path, file):
            return
    path.unlink(missing_ok=True)
    raise Corrupt(f"{key} in {store.url}: its bytes are not those of {file.name!r}: the object is damaged")


def _is_file(path: Path, file: StoredFile) -> bool:
    if not path.is_file() or path.stat().st_size != file.size_bytes:
        return False
    with path.open("rb") as opened:
        if hashlib.file_digest(opened, "sha256").hexdigest() != file.sha256:
            return False
        os.fsync(opened.fileno())
    return True


def _delete(store: ObjectStore, digest: str, incarnation: str) -> int:
    prefix = layout.content_data_prefix(digest, incarnation)
    store.abort_uploads(prefix)
    keys = [info.key for info in store.list(prefix)]
    store.delete(keys)
    return len(keys)
