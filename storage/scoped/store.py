"""A store and a log as a node sees them that holds no credentials: it asks the controller for each access.

A ``ScopedStore`` reads and writes by presigned requests; it never lists, deletes or makes log entries. A
``ScopedLedger`` reads and appends through the controller, which verifies a commit before it appends it. Both
ask by ``ask``, bytes to bytes, so that whatever carries the question need know nothing of it.
"""

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError

from .. import layout
from ..background import each
from ..content.state import Stored
from ..content.store import MAX_LISTING_BYTES
from ..errors import AccessDenied, StorageError, Unavailable
from ..object_store import ObjectInfo
from ..records import Committed, Record
from ..run_state import RunState
from ..s3.file_slice import FileSlice
from ..s3.presigned import Presigned
from ..s3.uplink import PARTS_AT_ONCE
from .grants import (
    MAX_CHECKPOINT_BYTES,
    MAX_FILES,
    REPLY,
    Append,
    Asked,
    Caller,
    Complete,
    Done,
    Find,
    Found,
    Granted,
    GrantedParts,
    Head,
    Look,
    Measured,
    Read,
    Refused,
    Reply,
    Request,
    Told,
    Write,
    committed_sizes,
)
from .http import Expired, PresignedHttp

PART_BYTES = 16 << 20
MULTIPART_BYTES = 64 << 20
"""Larger files are sent in parts, so that a cut connection costs one part."""
_TRIES = 4

Ask = Callable[[bytes], bytes]
"""Carries a request to the controller and its reply back.

Raises:
    Unavailable: The controller cannot be reached.
"""


class _Asking:
    """Asks in the name of one attempt."""

    def __init__(self, ask: Ask, caller: Caller) -> None:
        self._ask = ask
        self._caller = caller

    def __call__(self, asked: Asked) -> Reply:
        """Raises: whatever the controller refuses it with."""
        body = self._ask(Request(caller=self._caller, asked=asked).model_dump_json().encode())
        try:
            reply = REPLY.validate_json(body)
        except ValidationError:
            raise Unavailable("the controller's reply is not one that this version understands") from None
        if isinstance(reply, Refused):
            raise reply.as_error()
        return reply


class ScopedStore:
    """An ``ObjectStore`` for one attempt: what it may not do, it refuses.

    Args:
        url: The store's url, for messages.
        multipart_bytes: Files that are larger are sent in parts.
        part_bytes: How large the parts are.
    """

    def __init__(
        self,
        url: str,
        ask: Ask,
        caller: Caller,
        *,
        http: PresignedHttp | None = None,
        multipart_bytes: int = MULTIPART_BYTES,
        part_bytes: int = PART_BYTES,
    ) -> None:
        self._url = url
        self._ask = _Asking(ask, caller)
        self._http = http or PresignedHttp()
        self._multipart_bytes = multipart_bytes
        self._part_bytes = part_bytes
        self._sent: dict[str, Write] = {}
        """What lies in the store of the newest checkpoints, as it was asked for."""

    @property
    def url(self) -> str:
        return self._url

    def put(self, key: str, body: bytes | Path) -> None:
        """Write an object. One that is there already with these bytes is not sent again."""
        if isinstance(body, bytes):
            self._put(key, body, Write(key=key, size_bytes=len(body), md5=_md5(body)))
            return
        with body.open("rb", buffering=0) as file:
            self._put_file(key, file)

    def get(self, key: str) -> bytes:
        buffer = io.BytesIO()
        self._read(key, buffer, MAX_LISTING_BYTES)
        return buffer.getvalue()

    def download(self, key: str, target: Path) -> None:
        with target.open("wb") as file:
            self._read(key, file, MAX_CHECKPOINT_BYTES)

    def create(self, key: str, body: bytes) -> bool:
        raise _not_allowed(key, "create")

    def head(self, key: str) -> ObjectInfo | None:
        reply = self._ask(Head(key=key))
        if not isinstance(reply, Measured):
            raise Unavailable(f"{key}: the controller answers something else than was asked")
        return None if reply.size_bytes is None else ObjectInfo(key, reply.size_bytes)

    def find(self, digest: str) -> Stored | None:
        """Where in the store a content lies that the run is trained from; None if it is not there."""
        reply = self._ask(Find(digest=digest))
        if not isinstance(reply, Found):
            raise Unavailable("the controller answers something else than was asked")
        return reply.stored

    def name_again(self, keys: Iterable[str]) -> bool:
        """Ask once more for the writes that put these objects there; nothing is sent. False if none did.

        Whoever verifies a commit goes by what was asked for: a controller that started again knows of
        nothing, and one that has committed a part of a checkpoint has forgotten that part.
        """
        writes = [write for key in keys if (write := self._sent.get(key))]
        for write in writes:
            self._ask(write)
        return bool(writes)

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        raise _not_allowed(prefix, "list")

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            raise _not_allowed(key, "delete")

    def abort_uploads(self, prefix: str) -> int:
        raise _not_allowed(prefix, "abort uploads under")

    def unfinished(self, prefix: str) -> Iterator[ObjectInfo]:
        raise _not_allowed(prefix, "list uploads under")

    def _put_file(self, key: str, file: BinaryIO) -> None:
        size = os.fstat(file.fileno()).st_size
        whole = FileSlice(file.fileno(), 0, size)
        if size <= self._multipart_bytes:
            self._put(key, whole, Write(key=key, size_bytes=size, md5=whole.md5().hex()))
            return
        slices = [
            FileSlice(file.fileno(), start, min(self._part_bytes, size - start))
            for start in range(0, size, self._part_bytes)
        ]
        parts = tuple(part.md5().hex() for part in slices)
        write = Write(
            key=key, size_bytes=size, md5=whole.md5().hex(), part_bytes=self._part_bytes, parts=parts
        )
        self._put_parts(key, slices, write)

    def _put(self, key: str, body: bytes | FileSlice, write: Write) -> None:
        status = 0
        for _ in range(2):  # a second grant: the first may have expired, or its answer been lost
            granted = self._ask(write)
            if isinstance(granted, Done):
                self._note(write)
                return
            if isinstance(body, FileSlice):
                body.seek(0)
            status = self._http.put(key, _presigned(key, granted), body)
            if status < 300:
                self._note(write)
                return
        raise _unexpected(key, status)

    def _put_parts(self, key: str, slices: Sequence[FileSlice], write: Write) -> None:
        reply = self._ask(write)
        if isinstance(reply, Done):
            self._note(write)
            return
        if not isinstance(reply, GrantedParts) or len(reply.parts) != len(slices):
            raise Unavailable(f"{key}: the controller grants something else than was asked for")
        todo = [(part, granted) for part, granted in zip(slices, reply.parts, strict=True) if granted]
        # What a part that fails has cost is that part: the others are not asked for again.
        statuses = each("part", lambda one: self._put_part(key, *one), todo, at_once=PARTS_AT_ONCE)
        failed = [status for status in statuses if status is not None]
        if failed:
            raise failed[0]
        self._ask(Complete(key=key))
        self._note(write)

    def _note(self, write: Write) -> None:
        if layout.parse_data(write.key):
            self._sent[write.key] = write
            for old in list(self._sent)[: -2 * MAX_FILES]:
                self._sent.pop(old, None)

    def _put_part(self, key: str, part: FileSlice, granted: Granted) -> StorageError | None:
        try:
            part.seek(0)
            status = self._http.put(key, _presigned(key, granted), part)
        except StorageError as error:
            return error
        return None if status < 300 else _unexpected(key, status)

    def _read(self, key: str, file: BinaryIO, most_bytes: int) -> None:
        """Read an object, going on where a cut answer ended; each try asks for a signature of its own."""
        for tries_left in reversed(range(_TRIES)):
            granted = self._ask(Read(key=key))
            try:
                self._http.get(key, _presigned(key, granted), file, most_bytes)
                return
            except (Unavailable, Expired):
                if not tries_left:
                    raise


class ScopedLedger:
    """A run's log through the controller; implements ``Ledger``.

    Args:
        store: The attempt's, by which its checkpoints are sent.
    """

    def __init__(self, ask: Ask, caller: Caller, store: ScopedStore | None = None) -> None:
        self._ask = _Asking(ask, caller)
        self._run_id = caller.run_id
        self._store = store

    def refresh(self) -> RunState:
        return self._told(self._ask(Look()))

    def append(self, record: Record) -> RunState:
        try:
            return self._told(self._ask(Append(record=record)))
        except Unavailable:
            if self._store is None or not isinstance(record, Committed):
                raise
            if not self._store.name_again(committed_sizes(self._run_id, record)):
                raise
            return self._told(self._ask(Append(record=record)))

    def _told(self, reply: Reply) -> RunState:
        if not isinstance(reply, Told):
            raise Unavailable("the controller answers something else than was asked")
        return reply.state


def _presigned(key: str, reply: Reply) -> Presigned:
    if not isinstance(reply, Granted):
        raise Unavailable(f"{key}: the controller grants something else than was asked for")
    return Presigned(reply.url, reply.headers)


def _unexpected(key: str, status: int) -> StorageError:
    if status == 412:
        return Unavailable(f"{key}: it is there already; what is there is asked for next time")
    if status in (400, 403):
        # Expired meanwhile, or bytes changed on the way: a new grant may help.
        return Unavailable(f"{key}: the store refuses the granted request, with status {status}")
    return AccessDenied(f"{key}: the store answered {status}")


def _not_allowed(key: str, what: str) -> AccessDenied:
    return AccessDenied(f"{key}: a scoped node may not {what} it")


def _md5(body: bytes) -> str:
    return hashlib.md5(body, usedforsecurity=False).hexdigest()
