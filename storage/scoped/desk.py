"""The controller's side of scoped credentials: checks what a node asks, signs it, verifies what it commits.

What was granted is known in memory only. A controller that starts again knows of nothing: a commit is then
refused until the node has asked for its writes again, which finds each object in the store, with the bytes
that it names, and sends none of them twice.
"""

import contextlib
import hashlib
import logging
import re
import secrets
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pydantic import ValidationError

from .. import layout
from ..content.store import content_log
from ..errors import (
    AccessDenied,
    Corrupt,
    Fenced,
    InvalidName,
    NotFound,
    StorageError,
    Unavailable,
)
from ..object_store import ObjectStore
from ..records import Committed, Record
from ..redaction import printable, redacted
from ..run_state import RunState, holds, refusal
from ..s3.presigned import Presigned, Seen, Signer
from .grants import (
    EXPIRES_S,
    MAX_REQUEST_BYTES,
    REPLY,
    REQUEST,
    Append,
    Asked,
    Caller,
    Complete,
    Done,
    Find,
    Found,
    Given,
    Granted,
    GrantedParts,
    Head,
    Limits,
    Look,
    Measured,
    Read,
    Reply,
    Request,
    Told,
    Write,
    abandoned,
    check_caller,
    check_quota,
    check_read,
    check_record,
    check_write,
    committed_sizes,
    named_keys,
    refused,
    replaceable,
)

REREAD_BYTES = 16 << 20
"""A committed file up to this size is read back and compared with its sha256; of a larger one the size and
the MD5 that was signed are compared."""

PLACES = 6
"""So many requests of one attempt that change something are worked on or wait. Its own threads are fewer; of
what is meant to hold up the controller's threads, the rest goes away at once."""
TURN_S = 30.0
"""So long one waits for those before it."""
_MD5_NAME = re.compile(r"[0-9a-f]{32}(-[0-9]+)?")

logger = logging.getLogger(__name__)


class Runs(Protocol):
    """The runs that a desk grants for; the controller has it."""

    def state(self, run_id: str) -> RunState:
        """The run's state as last known.

        Raises:
            StorageError: There is no such run.
        """

    def refreshed(self, run_id: str) -> RunState:
        """The run's state as its log tells it now."""

    def append(self, run_id: str, record: Record) -> None:
        """Append a record to the run's log; see ``Ledger.append``."""

    def limits(self, run_id: str) -> Limits:
        """What the run's attempts may write."""


@dataclass(slots=True)
class _Desk:
    """What was granted to the newest attempt of one run."""

    attempt: int = 0
    given: dict[str, Given] = field(default_factory=dict)
    uploads: dict[str, str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    places: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(PLACES))


class GrantDesk:
    """Answers the nodes' requests. Used from any thread."""

    def __init__(
        self,
        store: ObjectStore,
        signer: Signer,
        runs: Runs,
        *,
        expires_s: int = EXPIRES_S,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._signer = signer
        self._runs = runs
        self._expires_s = expires_s
        self._monotonic = monotonic
        self._desks: dict[str, _Desk] = {}
        self._lock = threading.Lock()
        self.refusals: Counter[str] = Counter()
        """How often something was refused, by what was asked for and the kind of error."""

    def answer(self, body: bytes) -> bytes:
        """Answer one request; never raises for what it contains."""
        reply: Reply
        what = "request"
        try:
            request = _parsed(body)
            what = request.asked.ask
            reply = self._answer(request)
        except StorageError as error:
            self.refusals[f"{what}:{type(error).__name__}"] += 1
            # The node's own words are in it: they are not to do anything to a terminal.
            logger.warning("refused: %s: %s", what, redacted(printable(str(error)[:500])))
            reply = refused(error)
        return REPLY.dump_json(reply)

    def _answer(self, request: Request) -> Reply:
        caller, asked = request.caller, request.asked
        run_id = layout.check_name("run", caller.run_id)
        try:
            check_caller(self._runs.state(run_id), caller)
        except StorageError:
            # What is known here may be old news: only the log's present end can refuse.
            check_caller(self._runs.refreshed(run_id), caller)
        limits = self._runs.limits(run_id)
        match asked:
            case Look():
                return Told(state=self._present(caller, asked))
            case Read(key=key):
                check_read(self._present(caller, asked), caller, key, limits)
                return _granted(self._signer.get(key, self._expires_s))
            case Head(key=key):
                check_read(self._present(caller, asked), caller, key, limits)
                there = self._signer.seen(key)
                return Measured(size_bytes=there.size_bytes if there else None)
            case Find(digest=digest):
                if digest not in limits.inputs:
                    raise AccessDenied(f"content {digest[:12]}: this run is not trained from it")
                return Found(stored=content_log(self._store, digest).refresh().readable)
        desk = self._desk(caller)
        with _turn(caller, desk):
            state = self._present(caller, asked)
            match asked:
                case Write():
                    return self._write(caller, asked, state, desk)
                case Complete(key=key):
                    return self._complete(caller, key, state, desk)
                case Append(record=record):
                    return self._append(caller, record, state, desk)

    def _present(self, caller: Caller, asked: Asked) -> RunState:
        """The run's state to answer by: to change something, once it is this one's turn at the desk.

        What may become of a checkpoint's file is told by the log's present end alone: the record that names
        it may just have been written, by a request before this one or by one whose reply was lost. Nothing
        else depends on the log, and of it there are thousands of files.

        Raises:
            Fenced: The attempt is over by now.
        """
        others = isinstance(asked, Read | Head | Write | Complete) and layout.parse_data(asked.key) is None
        known = self._runs.state if others else self._runs.refreshed
        state = known(caller.run_id)
        check_caller(state, caller)
        return state

    def _desk(self, caller: Caller) -> _Desk:
        """The desk of the attempt. What an older one was granted is forgotten, what it had begun is ended.

        Raises:
            Fenced: A newer attempt has asked already.
        """
        with self._lock:
            desk = self._desks.setdefault(caller.run_id, _Desk(attempt=caller.attempt))
            if desk.attempt == caller.attempt:
                return desk
            if desk.attempt > caller.attempt:
                raise Fenced(f"{caller.run_id}: attempt {caller.attempt} is not running any more")
            new = self._desks[caller.run_id] = _Desk(attempt=caller.attempt)
        for key, upload in desk.uploads.items():
            with contextlib.suppress(StorageError):
                self._signer.abort(key, upload)
        return new

    def _write(self, caller: Caller, write: Write, state: RunState, desk: _Desk) -> Reply:
        limits = self._runs.limits(caller.run_id)
        check_write(state, caller, write, limits)
        named = named_keys(caller.run_id, state)
        self._make_room(write, desk, named)
        check_quota(state, write, desk.given, limits)
        there = self._signer.seen(write.key)
        if there and self._is(write, there):
            # A file of a salvage is named already, and granted for the whole checkpoint.
            self._end_upload(write.key, desk)
            self._give(write, desk)
            return Done()
        if there and not replaceable(state, caller, write.key):
            if layout.parse_sample(write.key):
                return Done()  # an older attempt made this picture of this step
            raise AccessDenied(f"{write.key}: it is committed, with other bytes")
        if there:
            self._store.delete([write.key])
        if write.parts:
            return self._write_parts(write, desk)
        self._end_upload(write.key, desk)
        signed = self._signer.put(write.key, write.size_bytes, write.md5, self._expires_s)
        self._give(write, desk)
        return _granted(signed)

    def _write_parts(self, write: Write, desk: _Desk) -> Reply:
        """Sign the parts that have not arrived; a part sent with the right bytes is never sent again."""
        known = desk.given.get(write.key)
        upload = desk.uploads.get(write.key)
        arrived: dict[int, Seen] = {}
        if upload and known and known.write == write:
            try:
                arrived = self._signer.parts(write.key, upload)
            except NotFound:
                upload = None
        else:
            # Of a file that has changed, or of a controller before this one.
            self._store.abort_uploads(write.key)
            upload = None
        if upload is None:
            upload = desk.uploads[write.key] = self._signer.begin(write.key)
        self._give(write, desk)
        return GrantedParts(
            parts=tuple(
                None
                if _is_part(write, number, arrived.get(number))
                else _granted(
                    self._signer.part(
                        write.key, upload, number, write.part_size(number), md5, self._expires_s
                    )
                )
                for number, md5 in enumerate(write.parts, start=1)
            )
        )

    def _complete(self, caller: Caller, key: str, state: RunState, desk: _Desk) -> Reply:
        if key in named_keys(caller.run_id, state):
            raise AccessDenied(
                f"{key}: it is committed"
            )  # completing would replace it: no server refuses that
        given, upload = desk.given.get(key), desk.uploads.get(key)
        if given is None or upload is None:
            raise Unavailable(f"{key}: no upload in parts is known here; ask for the write again")
        write = given.write
        try:
            arrived = self._signer.parts(key, upload)
        except NotFound as error:
            del desk.uploads[key]
            raise Unavailable(str(error)) from error
        wrong = [n for n in range(1, len(write.parts) + 1) if not _is_part(write, n, arrived.get(n))]
        if wrong or len(arrived) != len(write.parts):
            if len(arrived) > len(write.parts):
                self._end_upload(key, desk)
            raise Unavailable(f"{key}: parts are missing or not what was granted: {wrong[:10]}")
        try:
            self._signer.complete(key, upload, {number: part.etag for number, part in arrived.items()})
        except NotFound as error:
            del desk.uploads[key]
            # It may be complete, only the answer was lost: whoever asks for the write again learns it.
            raise Unavailable(str(error)) from error
        del desk.uploads[key]
        return Done()

    def _append(self, caller: Caller, record: Record, state: RunState, desk: _Desk) -> Reply:
        check_record(state, caller, record, self._runs.limits(caller.run_id))
        if isinstance(record, Committed) and not holds(state, record):
            if why := refusal(state, record):
                raise Fenced(f"{caller.run_id}: committed is refused: {why}")
            self._verify(caller, record, desk)
        self._runs.append(caller.run_id, record)
        if isinstance(record, Committed):
            self._settle(caller, record, self._runs.state(caller.run_id), desk)
        return Told(state=self._runs.state(caller.run_id))

    def _verify(self, caller: Caller, record: Committed, desk: _Desk) -> None:
        """Check that the objects that a commit names are there, are those granted, and are what it says.

        Raises:
            Unavailable: Nothing was granted for a file, as far as this controller knows.
            Corrupt: A file is not there, or not what the record says.
        """
        for file, (key, size) in zip(
            record.files, committed_sizes(caller.run_id, record).items(), strict=True
        ):
            given = desk.given.get(key)
            if given is None:
                raise Unavailable(f"{key}: nothing was granted for it here; send it again")
            there = self._signer.seen(key)
            if there is None:
                raise Corrupt(f"{key}: it is not there")
            if not there.size_bytes == given.write.size_bytes == size:
                raise Corrupt(
                    f"{key}: {there.size_bytes} bytes, its record says {size}, "
                    f"granted were {given.write.size_bytes}"
                )
            if size > REREAD_BYTES and there.etag == given.write.etag:
                continue  # the server has compared every byte with the MD5 that was signed
            if self._digest(key, "sha256") != (file.packed.sha256 if file.packed else file.sha256):
                raise Corrupt(f"{key}: its sha256 is not the one that its record says")

    def _settle(self, caller: Caller, record: Committed, state: RunState, desk: _Desk) -> None:
        """Forget what is committed; delete what was written beside it and no record names."""
        prefix = layout.checkpoint_prefix(caller.run_id, record.attempt, record.incarnation, record.step)
        named = named_keys(caller.run_id, state)
        beside = [key for key in desk.given if key.startswith(prefix) and key not in named]
        for key in committed_sizes(caller.run_id, record):
            self._end_upload(key, desk)
            desk.given.pop(key, None)
        if record.resumable and beside:
            try:
                self._store.delete(beside)
            except StorageError as error:
                logger.warning("%s: not deleted: %s", beside[0], error)

    def _make_room(self, write: Write, desk: _Desk, named: Set[str]) -> None:
        """Delete what lies under older steps and was never committed; forget what was."""
        data = layout.parse_data(write.key)
        old = abandoned(desk.given, data.step, self._monotonic()) if data else []
        gone = [key for key in old if key not in named]
        for key in gone:
            self._end_upload(key, desk)
        self._store.delete(gone)
        for key in old:
            del desk.given[key]

    def _end_upload(self, key: str, desk: _Desk) -> None:
        """Forget an upload in parts, so that nothing is ever made of it, and drop what has arrived."""
        if upload := desk.uploads.pop(key, None):
            try:
                self._signer.abort(key, upload)
            except StorageError as error:
                logger.warning("%s: its upload is not aborted: %s", key, error)

    def _give(self, write: Write, desk: _Desk) -> None:
        desk.given[write.key] = Given(write=write, until=self._monotonic() + self._expires_s)

    def _is(self, write: Write, there: Seen) -> bool:
        """Whether an object is the one that was named. Some servers' ETag says nothing: then it is read.

        Not a large one whose ETag is that of other bytes, or of other parts: sending it again costs the node
        that asks, reading it would cost the controller.
        """
        if there.size_bytes != write.size_bytes:
            return False
        if there.etag == write.etag:
            return True
        if there.size_bytes > REREAD_BYTES and _MD5_NAME.fullmatch(there.etag):
            return False
        return self._digest(write.key, "md5") == write.md5

    def _digest(self, key: str, algorithm: str) -> str:
        """Read an object back. Through a file: it may be larger than the memory."""
        with tempfile.TemporaryDirectory(prefix="orchestrate-verify-") as folder:
            path = Path(folder) / "object"
            self._store.download(key, path)
            with path.open("rb") as file:
                return hashlib.file_digest(file, algorithm).hexdigest()


@contextlib.contextmanager
def _turn(caller: Caller, desk: _Desk) -> Iterator[None]:
    """Be the only one who is answered at a desk.

    Raises:
        Unavailable: Others are before this one, for too long or too many of them.
    """
    if not desk.places.acquire(blocking=False):
        raise Unavailable(f"{caller.run_id}: {PLACES} requests of this attempt are being answered; try again")
    try:
        if not desk.lock.acquire(timeout=TURN_S):
            raise Unavailable(f"{caller.run_id}: another request takes more than {TURN_S:.0f} s; try again")
        try:
            yield
        finally:
            desk.lock.release()
    finally:
        desk.places.release()


def unenforced(store: ObjectStore, signer: Signer, send: Callable[[Presigned, bytes], int]) -> str | None:
    """Say what a server does not enforce of a signed write, having tried; None if it enforces all of it.

    Args:
        send: Sends a presigned PUT with a body, and returns the answer's status.
    """
    body = b"granted"
    md5 = hashlib.md5(body, usedforsecurity=False).hexdigest()
    key = f"probe/{secrets.token_hex(8)}/granted"
    signed = signer.put(key, len(body), md5, 60)

    def without(header: str) -> Presigned:
        return Presigned(signed.url, {k: v for k, v in signed.headers.items() if k != header})

    try:
        for what, request, payload in (
            ("a missing If-None-Match", without("If-None-Match"), body),
            ("another length", Presigned(signed.url, {**signed.headers, "Content-Length": "8"}), b"granted!"),
            ("another MD5", signed, b"greeted"),
        ):
            if send(request, payload) < 400 or store.head(key) is not None:
                return f"it accepts {what}"
        if (status := send(signed, body)) >= 300:
            return f"it refuses a granted write, with status {status}"
        if send(signed, body) != 412:
            return "it lets a granted write be repeated"
    finally:
        store.delete([key])
    return None


def _parsed(body: bytes) -> Request:
    if len(body) > MAX_REQUEST_BYTES:
        raise InvalidName(f"a request of {len(body)} bytes, at most {MAX_REQUEST_BYTES}")
    try:
        return REQUEST.validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise InvalidName(f"not a request: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def _granted(signed: Presigned) -> Granted:
    return Granted(url=signed.url, headers=dict(signed.headers))


def _is_part(write: Write, number: int, arrived: Seen | None) -> bool:
    return arrived is not None and (arrived.size_bytes, arrived.etag) == (
        write.part_size(number),
        write.parts[number - 1],
    )
