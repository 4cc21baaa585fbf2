"""Large files in parts: a few at once, each verified by the server, and after a cut only what is missing.

What is known of an upload that failed (its id, its finished parts, which file they are of) stays in memory;
the next ``put`` of the same key and the unchanged file goes on from there. A changed file begins anew, and so
does an upload that the server has forgotten; what cannot go on is aborted. If the process dies the server
keeps the parts until ``abort_uploads``.

How many parts travel at once follows the uplink: on a slow one a single connection fills it, and every part
under way is lost by a cut.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from ..background import begin
from ..errors import NotFound, StorageError, Unavailable
from .deadline import answered_within, current, until
from .errors import NO_UPLOAD, code_of
from .etag import of_parts
from .file_slice import FileSlice, content_md5
from .retry import Send
from .uplink import (
    COMPLETE_ANSWER_S,
    COMPLETE_S,
    PART_BYTES,
    Uplink,
    allowance_s,
    answer_s,
    part_bytes,
    parts_at_once,
    sent_whole,
)

_KEPT_UPLOADS = 4
_ABORT_S = 10.0

T = TypeVar("T")


class UploadForgotten(StorageError):
    """The server does not know the upload, or not its parts."""


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """Which state of which file: another one never continues an upload of this one."""

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> "FileIdentity":
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class SentPart:
    etag: str
    md5: bytes


@dataclass(slots=True)
class Upload:
    """A multipart upload that is not complete, as far as we know it."""

    key: str
    full_key: str
    upload_id: str
    path: Path
    file: FileIdentity
    parts: dict[int, SentPart] = field(default_factory=dict)

    @property
    def part_bytes(self) -> int:
        return part_bytes(self.file.size_bytes)

    @property
    def missing(self) -> list[int]:
        count = -(-self.file.size_bytes // self.part_bytes)
        return [number for number in range(1, count + 1) if number not in self.parts]

    @property
    def etag(self) -> str:
        """What most servers call an object of these parts."""
        return f'"{of_parts(part.md5 for _, part in sorted(self.parts.items()))}"'

    @property
    def can_go_on(self) -> bool:
        """Whether its file is still there, unchanged."""
        try:
            return FileIdentity.of(self.path.stat()) == self.file
        except OSError:
            return False


class Uploads:
    """Sends files to one bucket, and remembers what could not be finished. Used from any thread."""

    def __init__(self, bucket: str, request: Send, request_s: float) -> None:
        self._bucket = bucket
        self._request = request
        self._request_s = request_s
        self._uplink = Uplink()
        self._names_by_md5 = True
        self._unfinished: dict[str, Upload] = {}
        self._lock = threading.Lock()

    def put(self, key: str, full_key: str, path: Path) -> None:
        """Send a file, going on with an earlier try if there is one."""
        with path.open("rb", buffering=0) as file:
            identity = FileIdentity.of(os.fstat(file.fileno()))
            rate = self._uplink.bytes_per_s
            known = self._take(key, identity)
            self._abort_hopeless()
            if known is None and sent_whole(identity.size_bytes, rate):
                self._put_whole(key, full_key, file, identity.size_bytes)
                return
            if known is not None:
                try:
                    self._finish(known, file)
                    return
                except UploadForgotten:
                    self._abort(known)
            try:
                self._finish(self._start(key, full_key, path, identity), file)
            except UploadForgotten as error:
                # Whoever aborted it meant it: it begins anew when it is asked for anew.
                raise Unavailable(f"{key}: the upload was aborted while it was under way") from error

    def abort_all(self, prefix: str) -> int:
        """Abort what is unfinished under a prefix; return how many uploads that were."""
        with self._lock:
            found = [upload for key, upload in self._unfinished.items() if key.startswith(prefix)]
            for upload in found:
                del self._unfinished[upload.key]
        for upload in found:
            self._abort(upload)
        return len(found)

    def abandon(self, key: str) -> None:
        """Abort what is left of an earlier try: the key gets another content, or none."""
        if key in self._unfinished:
            self._take(key, None)

    def _take(self, key: str, identity: FileIdentity | None) -> Upload | None:
        """The unfinished upload of a key if it is of this file; if it is of another, it is aborted."""
        with self._lock:
            known = self._unfinished.pop(key, None)
        if known is None or known.file == identity:
            return known
        self._abort(known)
        return None

    def _keep(self, upload: Upload) -> None:
        with self._lock:
            other = self._unfinished.pop(upload.key, None)
            self._unfinished[upload.key] = upload
            oldest = next(iter(self._unfinished)) if len(self._unfinished) > _KEPT_UPLOADS else None
            too_many = self._unfinished.pop(oldest) if oldest else None
        for surplus in filter(None, (other, too_many)):
            self._abort(surplus)

    def _abort_hopeless(self) -> None:
        with self._lock:
            hopeless = [upload for upload in self._unfinished.values() if not upload.can_go_on]
            for upload in hopeless:
                del self._unfinished[upload.key]
        for upload in hopeless:
            self._abort(upload)

    def _abort(self, upload: Upload) -> None:
        """Once and briefly: what stays behind is found by ``abort_uploads``."""
        with contextlib.suppress(StorageError):
            self._request(
                upload.key,
                lambda client: client.abort_multipart_upload(
                    Bucket=self._bucket, Key=upload.full_key, UploadId=upload.upload_id
                ),
                allow_s=_ABORT_S,
            )

    def _put_whole(self, key: str, full_key: str, file: BinaryIO, size_bytes: int) -> None:
        """Send a file by one request, whose content the server verifies.

        A small one goes with its MD5. A larger one is hashed while it is sent, which costs no time, and
        compared with the name that the server gives the content: usually its MD5. If it is another, nobody
        knows why, and the file is sent again, from then on with its MD5.
        """
        if size_bytes > PART_BYTES and self._names_by_md5:
            body = FileSlice(file.fileno(), 0, size_bytes, hashing=True)
            answer = self._timed(key, self._putting(full_key, lambda: body, size_bytes, {}), size_bytes)
            if answer.get("ETag") == f'"{body.sent_md5.hex()}"':
                return
            self._names_by_md5 = False
        digest = content_md5(FileSlice(file.fileno(), 0, size_bytes).md5())
        whole = partial(FileSlice, file.fileno(), 0, size_bytes)
        self._timed(key, self._putting(full_key, whole, size_bytes, {"ContentMD5": digest}), size_bytes)

    def _putting(
        self, full_key: str, body: Callable[[], FileSlice], size_bytes: int, options: dict[str, str]
    ) -> Callable[[Any], Any]:
        def send(client: Any) -> Any:
            began = time.monotonic()
            whole = body()
            whole.seek(0)
            with answered_within(answer_s(size_bytes)):
                answer = client.put_object(
                    Bucket=self._bucket, Key=full_key, Body=whole, ContentLength=size_bytes, **options
                )
            self._uplink.carried(size_bytes, time.monotonic() - began)
            return answer

        return send

    def _start(self, key: str, full_key: str, path: Path, identity: FileIdentity) -> Upload:
        answer = self._request(
            key, lambda client: client.create_multipart_upload(Bucket=self._bucket, Key=full_key)
        )
        if not (upload_id := answer.get("UploadId")):
            raise Unavailable(f"{key}: the server does not name the upload that it began")
        return Upload(key, full_key, upload_id, path, identity)

    def _finish(self, upload: Upload, file: BinaryIO) -> None:
        try:
            self._send_parts(upload, file)
            if FileIdentity.of(os.fstat(file.fileno())) != upload.file:
                raise Unavailable(f"{upload.path}: changed while it was uploaded")
            self._complete(upload, file)
        except UploadForgotten:
            raise
        except BaseException:
            self._keep(upload)
            raise

    def _send_parts(self, upload: Upload, file: BinaryIO) -> None:
        """Send what is missing. The first failure ends it, once the parts under way have ended too."""
        todo = iter(upload.missing)
        deadline = current()
        running: set[Future[None]] = set()
        failure: BaseException | None = None
        try:
            while True:
                at_once = parts_at_once(self._uplink.bytes_per_s) if failure is None else 0
                for number in _some(todo, at_once - len(running)):
                    running.add(begin("part", self._send_part, upload, file, number, at_once, deadline))
                if not running:
                    break
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for one in done:
                    failure = failure or one.exception()
        finally:
            wait(running)  # they read from the file
        if failure is not None:
            raise failure

    def _send_part(
        self, upload: Upload, file: BinaryIO, number: int, at_once: int, deadline: float | None
    ) -> None:
        start = (number - 1) * upload.part_bytes
        length = min(upload.part_bytes, upload.file.size_bytes - start)
        digest = FileSlice(file.fileno(), start, length).md5()

        def send(client: Any) -> Any:
            began = time.monotonic()
            with self._known(upload), answered_within(answer_s(length)):
                answer = client.upload_part(
                    Bucket=self._bucket,
                    Key=upload.full_key,
                    UploadId=upload.upload_id,
                    PartNumber=number,
                    Body=FileSlice(file.fileno(), start, length),
                    ContentLength=length,
                    ContentMD5=content_md5(digest),
                )
            self._uplink.carried(length, time.monotonic() - began, at_once)
            return answer

        with until(deadline):
            answer = self._timed(upload.key, send, length, at_once)
        if not (etag := answer.get("ETag")):
            raise Unavailable(f"{upload.key}: the server does not name the part that it took: no ETag")
        upload.parts[number] = SentPart(etag, digest)

    def _complete(self, upload: Upload, file: BinaryIO) -> None:
        parts = [{"PartNumber": number, "ETag": part.etag} for number, part in sorted(upload.parts.items())]

        def send(client: Any) -> None:
            with self._known(upload), answered_within(COMPLETE_ANSWER_S):
                client.complete_multipart_upload(
                    Bucket=self._bucket,
                    Key=upload.full_key,
                    UploadId=upload.upload_id,
                    MultipartUpload={"Parts": parts},
                )

        try:
            self._request(upload.key, send, allow_s=COMPLETE_S)
        except UploadForgotten:
            # It is forgotten too after a completion whose answer was lost.
            if not self._is_there(upload, file):
                raise

    def _is_there(self, upload: Upload, file: BinaryIO) -> bool:
        """Whether the key holds this very file, as far as the server's name for the content tells."""
        try:
            found = self._request(
                upload.key,
                lambda client: client.head_object(Bucket=self._bucket, Key=upload.full_key),
            )
        except NotFound:
            return False
        if found["ContentLength"] != upload.file.size_bytes:
            return False
        # Some servers name the parts' digests, some the whole's; any other name costs a second upload.
        etag = found.get("ETag")
        if etag == upload.etag:
            return True
        return bool(etag == f'"{FileSlice(file.fileno(), 0, upload.file.size_bytes).md5().hex()}"')

    def _timed(self, key: str, send: Callable[[Any], T], size_bytes: int, at_once: int = 1) -> T:
        """Send a body in the time that it may take on this uplink."""
        rate = self._uplink.bytes_per_s
        try:
            return self._request(key, send, allow_s=self._request_s + allowance_s(size_bytes * at_once, rate))
        except Unavailable:
            self._uplink.stuck()
            raise

    @contextlib.contextmanager
    def _known(self, upload: Upload) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if code_of(error) in NO_UPLOAD:
                raise UploadForgotten(f"{upload.key}: the server has forgotten the upload") from error
            raise


def _some(numbers: Iterator[int], most: int) -> Iterator[int]:
    for _ in range(most):
        if (number := next(numbers, None)) is None:
            return
        yield number
