"""A store in an S3-compatible bucket.

Every request has a deadline for all of its tries together, and a budget of repetitions that is shared with
all others (``retry``). ``create`` is sent once, because a repeated conditional write meets its own
first try and reports a conflict; only after a refusal of its credentials, a definite answer, is it sent with
new ones. Large files go in parts and are resumed (``multipart``).
"""

import contextlib
import io
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

from .. import layout
from ..errors import NotFound, StorageError, Unavailable
from ..object_store import ObjectInfo
from .client import S3Client
from .deadline import answered_within, left_s, within
from .errors import (
    EXPIRED,
    FOREIGN,
    code_of,
    headers_of,
    retry_after_s,
    status_of,
    translate,
)
from .file_slice import md5_of
from .multipart import Uploads
from .presigned import Signer
from .ranged_get import Download
from .retry import TRIES, RetryBudget, pause_s
from .uplink import allowance_s, answer_s

REQUEST_S = 60.0
"""A request and its repetitions are done by then; bodies of files get more, by their size."""
PAGE_KEYS = 1000
"""Of so many keys an answer to a listing tells; servers tell of no more."""
_NO_UPLOADS = {"NoSuchUpload", "NotImplemented"}
"""There is none, any more or at all; some servers say the first of a bucket that never had any."""

T = TypeVar("T")


class S3Store:
    """An ``ObjectStore`` over one bucket and prefix.

    Args:
        check_then_put: ``create`` looks whether the key is free, then writes. For servers that ignore
            ``If-None-Match`` or do not keep it under a race: right only while a single process appends.
        request_s: Seconds for a request and its repetitions. ``deadline.within`` around a call
            shortens it for that call.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        endpoint: str | None = None,
        region: str | None = None,
        check_then_put: bool = False,
        request_s: float = REQUEST_S,
    ) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._endpoint = endpoint
        self._region = region
        self._request_s = request_s
        self.check_then_put = check_then_put
        self._budget = RetryBudget()
        self._uploads = Uploads(bucket, self._request, request_s)
        self._renewing = threading.Lock()
        with self._translated("settings"):
            self._client = S3Client(endpoint, region)

    @property
    def url(self) -> str:
        options = [
            f"{name}={value}"
            for name, value in (("endpoint", self._endpoint), ("region", self._region))
            if value
        ]
        query = f"?{'&'.join(options)}" if options else ""
        return f"s3://{self._bucket}/{self._prefix.rstrip('/')}{query}"

    def put(self, key: str, body: bytes | Path) -> None:
        full = self._key(key)
        if isinstance(body, Path):
            with self._translated(key):
                self._uploads.put(key, full, body)
            return
        self._uploads.abandon(key)

        def send(client: Any) -> None:
            with answered_within(answer_s(len(body))):
                client.put_object(Bucket=self._bucket, Key=full, Body=body, ContentMD5=md5_of(body))

        self._request(key, send, allow_s=self._request_s + allowance_s(len(body), None))

    def create(self, key: str, body: bytes) -> bool:
        if self.check_then_put:
            if self.head(key) is not None:
                return False
            self.put(key, body)
            return True
        full = self._key(key)

        def send(client: Any) -> bool:
            try:
                client.put_object(
                    Bucket=self._bucket, Key=full, Body=body, ContentMD5=md5_of(body), IfNoneMatch="*"
                )
                return True
            except FOREIGN as error:
                match status_of(error):
                    case 412:
                        return False
                    case 409:
                        # Another create of this key was under way, and may yet fail: only a look tells.
                        if self.head(key) is not None:
                            return False
                        raise Unavailable(f"{self._named(key)}: conflicting creates, none has won") from error
                raise

        return self._request(key, send, tries=1)

    def get(self, key: str) -> bytes:
        full = self._key(key)

        content = io.BytesIO()
        with self._translated(key):
            self._download(key, full).into(content)
        return content.getvalue()

    def download(self, key: str, target: Path) -> None:
        full = self._key(key)
        with self._translated(key), target.open("wb") as file:
            self._download(key, full).into(file)

    def head(self, key: str) -> ObjectInfo | None:
        full = self._key(key)
        try:
            answer = self._request(key, lambda client: client.head_object(Bucket=self._bucket, Key=full))
        except NotFound:
            return None
        return ObjectInfo(key, answer["ContentLength"])

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        options = {"StartAfter": self._prefix + after} if after else {}

        def page(marker: dict[str, Any]) -> dict[str, Any]:
            return self._request(
                prefix,
                lambda client: client.list_objects_v2(
                    Bucket=self._bucket,
                    Prefix=self._prefix + prefix,
                    MaxKeys=PAGE_KEYS,
                    **options,
                    **marker,
                ),
            )

        for answer in _pages(self._named(prefix), page, {"ContinuationToken": "NextContinuationToken"}):
            for found in answer.get("Contents", ()):
                key = found["Key"].removeprefix(self._prefix)
                # Some servers ignore StartAfter.
                if key > after:
                    etag = found.get("ETag", "").strip('"')
                    yield ObjectInfo(key, found["Size"], _unix(found.get("LastModified")), etag or None)

    def delete(self, keys: Iterable[str]) -> None:
        # One request each: deleting in batches needs a checksum on which servers do not agree.
        for key in keys:
            full = self._key(key)
            self._uploads.abandon(key)
            with contextlib.suppress(NotFound):
                self._request(key, self._deleting(full))

    def abort_uploads(self, prefix: str) -> int:
        ours = self._uploads.abort_all(prefix)
        found = list(self._uploads_under(prefix))
        for upload in found:
            key = upload["Key"].removeprefix(self._prefix)
            self._request(key, self._aborting(upload["Key"], upload["UploadId"]))
        return ours + len(found)

    def unfinished(self, prefix: str) -> Iterator[ObjectInfo]:
        for upload in self._uploads_under(prefix):
            key = upload["Key"].removeprefix(self._prefix)
            yield ObjectInfo(key, 0, _unix(upload.get("Initiated")))

    def server_time(self) -> datetime | None:
        """What the server's clock says, to the second; None if its answers carry no date.

        A refusal tells the time too: one that refuses a wrong clock, for example.
        """

        def ask(client: Any) -> str:
            try:
                answer = client.head_bucket(Bucket=self._bucket)
            except FOREIGN as error:
                if not status_of(error):
                    raise
                return headers_of(error).get("date", "")
            return str(answer["ResponseMetadata"]["HTTPHeaders"].get("date", ""))

        try:
            moment = parsedate_to_datetime(self._request("server time", ask))
        except ValueError:
            return None
        return moment.replace(tzinfo=moment.tzinfo or UTC)

    def signer(self) -> Signer:
        """Signs requests on this bucket for whoever holds no credentials."""
        return Signer(self._bucket, self._key, self._request)

    def _download(self, key: str, full_key: str) -> Download:
        return Download(self._request, self._budget, self._bucket, key, full_key, self._request_s)

    def _key(self, key: str) -> str:
        return layout.check_path(self._prefix + layout.check_path(key))

    def _deleting(self, full_key: str) -> Callable[[Any], object]:
        return lambda client: client.delete_object(Bucket=self._bucket, Key=full_key)

    def _aborting(self, full_key: str, upload_id: str) -> Callable[[Any], object]:
        return lambda client: _unless(
            _NO_UPLOADS,
            lambda: client.abort_multipart_upload(Bucket=self._bucket, Key=full_key, UploadId=upload_id),
        )

    def _uploads_under(self, prefix: str) -> Iterator[dict[str, Any]]:
        def page(marker: dict[str, Any]) -> dict[str, Any]:
            return (
                self._request(
                    prefix,
                    lambda client: _unless(
                        _NO_UPLOADS,
                        lambda: client.list_multipart_uploads(
                            Bucket=self._bucket, Prefix=self._prefix + prefix, **marker
                        ),
                    ),
                )
                or {}
            )

        markers = {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"}
        for answer in _pages(self._named(prefix), page, markers):
            yield from answer.get("Uploads", ())

    def _request(
        self, key: str, send: Callable[[Any], T], *, allow_s: float | None = None, tries: int = TRIES
    ) -> T:
        """Do one request, again if that may help and time, tries and the budget allow it.

        Raises:
            StorageError: In the words of this package, about the key.
        """
        refused: S3Client | None = None
        with self._translated(key), within(allow_s or self._request_s):
            failures = 0
            while True:
                used = self._client
                try:
                    answer = send(used.requests)
                except FOREIGN as error:
                    if refused is None and self._renewed(used, error):
                        refused = used
                        continue
                    failures += 1
                    if failures >= tries or not self._wait_to_repeat(error, failures):
                        raise
                else:
                    self._budget.refill()
                    return answer

    def _wait_to_repeat(self, error: Exception, failures: int) -> bool:
        """Pause before a request is repeated; False at once if it is not to be."""
        if not isinstance(translate(error, ""), Unavailable):
            return False
        wait_s = pause_s(failures, retry_after_s(error))
        if wait_s >= left_s() or not self._budget.spend():
            return False
        time.sleep(wait_s)
        return True

    def _renewed(self, used: S3Client, error: Exception) -> bool:
        """Whether a refused request is worth another try, with credentials read anew."""
        expired = code_of(error) in EXPIRED
        if not expired and status_of(error) not in (401, 403):
            return False
        with self._renewing:
            if self._client is not used:
                return True
            fresh = S3Client(self._endpoint, self._region)
            if fresh.same_credentials(used):
                return expired
            self._client = fresh
            return True

    def _named(self, key: str) -> str:
        return f"{key} in {self.url}" if key else self.url

    @contextlib.contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except FOREIGN as error:
            raise translate(error, self._named(key)) from error


def _pages(
    named: str, page: Callable[[dict[str, Any]], dict[str, Any]], markers: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """All pages of a listing, whose answers say by what markers to ask for the next one.

    Raises:
        Unavailable: They say that there is more, and not how to ask for it.
    """
    at: dict[str, Any] = {}
    while True:
        answer = page(at)
        yield answer
        if not answer.get("IsTruncated"):
            return
        following = {name: answer[field] for name, field in markers.items() if answer.get(field)}
        if not following or following == at:
            # What was not listed would count as not there.
            raise Unavailable(f"{named}: the server has more to list and does not say how to ask for it")
        at = following


def _unless(codes: set[str], request: Callable[[], T]) -> T | None:
    """Do a request; None if the answer is one of these errors."""
    try:
        return request()
    except FOREIGN as error:
        if code_of(error) not in codes:
            raise
        return None


def _unix(moment: datetime | None) -> float | None:
    return moment.timestamp() if moment else None
