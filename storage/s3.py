"""A store in an S3-compatible bucket: the only module that meets boto3, whose errors it translates.

Client settings that every server we know accepts: path addressing, no checksum trailers, ``Content-MD5`` on
single writes. ``create`` is sent once, because a repeated conditional write meets its own first try and
reports a conflict; everything else is repeated by the SDK, within bounds.
"""

import base64
import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Set
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import boto3
import boto3.exceptions
import botocore.exceptions as boto_errors
from boto3.s3.transfer import TransferConfig
from botocore.config import Config

from . import layout
from .errors import AccessDenied, InvalidName, NotFound, StorageError, Unavailable
from .object_store import ObjectInfo

MULTIPART_BYTES = 64 << 20
"""Larger files are sent in parts, so that a cut connection costs one part."""
_PART_BYTES = 16 << 20
_PARTS_AT_ONCE = 4
_DOWNLOAD_TRIES = 4
_CHUNK_BYTES = 1 << 20

_NOT_FOUND = {"404", "NoSuchKey", "NotFound"}
_NO_UPLOADS = {"NoSuchUpload", "NotImplemented"}
"""There is none, any more or at all; some servers say the first of a bucket that never had any."""
_TRANSIENT = {
    "BadDigest",
    "IncompleteBody",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "RequestTimeoutException",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "TooManyRequestsException",
    "XAmzContentSHA256Mismatch",
}
_HINTS = {
    "NoSuchBucket": "create the bucket first",
    "RequestTimeTooSkewed": "set this machine's clock",
    "PermanentRedirect": "the bucket is in another region: add ?region=… to the store url",
    "AuthorizationHeaderMalformed": "the bucket is in another region: add ?region=… to the store url",
    "IllegalLocationConstraintException": "the bucket is in another region: add ?region=… to the store url",
    "NotImplemented": "this server does not support the request",
}
_MISCONFIGURED = (
    boto_errors.NoCredentialsError,
    boto_errors.PartialCredentialsError,
    boto_errors.ProfileNotFound,
    boto_errors.TokenRetrievalError,
    boto_errors.UnauthorizedSSOTokenError,
)
_MALFORMED = (boto_errors.ParamValidationError, boto_errors.InvalidEndpointConfigurationError)


class S3Store:
    """An ``ObjectStore`` over one bucket and prefix.

    Args:
        check_then_put: ``create`` looks whether the key is free, then writes. For servers that ignore
            ``If-None-Match`` or do not keep it under a race: right only while a single process appends.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        endpoint: str | None = None,
        region: str | None = None,
        check_then_put: bool = False,
    ) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._endpoint = endpoint
        self._region = region
        self.check_then_put = check_then_put
        with self._translated("settings"):
            session = boto3.session.Session()
            # Servers behind an endpoint of their own ignore the region, but requests are signed for one.
            chosen = region or session.region_name or ("us-east-1" if endpoint else None)
            self._client = _client(session, endpoint, chosen, {"mode": "standard", "total_max_attempts": 3})
            self._sent_once = _client(session, endpoint, chosen, {"total_max_attempts": 1})

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
        with self._translated(key):
            if isinstance(body, bytes):
                self._client.put_object(Bucket=self._bucket, Key=full, Body=body, ContentMD5=_md5(body))
                return
            with body.open("rb") as file:
                if body.stat().st_size > MULTIPART_BYTES:
                    self._client.upload_fileobj(file, self._bucket, full, Config=_TRANSFER)
                else:
                    digest = base64.b64encode(hashlib.file_digest(file, "md5").digest()).decode()
                    file.seek(0)
                    self._client.put_object(Bucket=self._bucket, Key=full, Body=file, ContentMD5=digest)

    def create(self, key: str, body: bytes) -> bool:
        if self.check_then_put:
            if self.head(key) is not None:
                return False
            self.put(key, body)
            return True
        with self._translated(key):
            try:
                self._sent_once.put_object(
                    Bucket=self._bucket,
                    Key=self._key(key),
                    Body=body,
                    ContentMD5=_md5(body),
                    IfNoneMatch="*",
                )
                return True
            except boto_errors.ClientError as error:
                match _status(error):
                    case 412:
                        return False
                    case 409:
                        # Another create of this key was under way, and may yet fail: only a look tells.
                        if self.head(key) is not None:
                            return False
                        raise Unavailable(f"{self._named(key)}: conflicting creates, none has won") from error
                raise

    def get(self, key: str) -> bytes:
        full = self._key(key)
        with self._translated(key):
            body: bytes = self._client.get_object(Bucket=self._bucket, Key=full)["Body"].read()
            return body

    def download(self, key: str, target: Path) -> None:
        full = self._key(key)
        with self._translated(key), target.open("wb") as file:
            for tries_left in reversed(range(_DOWNLOAD_TRIES)):
                try:
                    self._stream(full, file)
                    return
                except _STREAM_ERRORS:
                    if not tries_left:
                        raise

    def head(self, key: str) -> ObjectInfo | None:
        try:
            with self._translated(key):
                answer = self._client.head_object(Bucket=self._bucket, Key=self._key(key))
        except NotFound:
            return None
        return ObjectInfo(key, answer["ContentLength"])

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        options: dict[str, str] = {"StartAfter": self._prefix + after} if after else {}
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=self._prefix + prefix, **options
        )
        with self._translated(prefix):
            for page in pages:
                for found in page.get("Contents", ()):
                    key = found["Key"].removeprefix(self._prefix)
                    # Some servers ignore StartAfter.
                    if key > after:
                        yield ObjectInfo(key, found["Size"], _unix(found.get("LastModified")))

    def delete(self, keys: Iterable[str]) -> None:
        # One request each: deleting in batches needs a checksum on which servers do not agree.
        for key in keys:
            with self._translated(key), contextlib.suppress(NotFound):
                self._client.delete_object(Bucket=self._bucket, Key=self._key(key))

    def abort_uploads(self, prefix: str) -> int:
        pages = self._client.get_paginator("list_multipart_uploads").paginate(
            Bucket=self._bucket, Prefix=self._prefix + prefix
        )
        found = []
        with self._translated(prefix), _suppressed(_NO_UPLOADS):
            found = [upload for page in pages for upload in page.get("Uploads", ())]
        for upload in found:
            with self._translated(upload["Key"]), _suppressed(_NO_UPLOADS):
                self._client.abort_multipart_upload(
                    Bucket=self._bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                )
        return len(found)

    def unfinished(self, prefix: str) -> Iterator[ObjectInfo]:
        pages = self._client.get_paginator("list_multipart_uploads").paginate(
            Bucket=self._bucket, Prefix=self._prefix + prefix
        )
        with self._translated(prefix), _suppressed(_NO_UPLOADS):
            for page in pages:
                for upload in page.get("Uploads", ()):
                    key = upload["Key"].removeprefix(self._prefix)
                    yield ObjectInfo(key, 0, _unix(upload.get("Initiated")))

    def server_time(self) -> datetime | None:
        """What the server's clock says, to the second; None if its answers carry no date.

        A refusal tells the time too: one that refuses a wrong clock, for example.
        """
        with self._translated("server time"):
            try:
                answer = self._client.head_bucket(Bucket=self._bucket)
            except boto_errors.ClientError as error:
                answer = error.response
        date = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
        try:
            moment = parsedate_to_datetime(date or "")
        except ValueError:
            return None
        return moment.replace(tzinfo=moment.tzinfo or UTC)

    def _key(self, key: str) -> str:
        return layout.check_path(self._prefix + layout.check_path(key))

    def _stream(self, full_key: str, file: Any) -> None:
        """Append to a file what it does not have of the object yet."""
        offset = file.tell()
        options = {"Range": f"bytes={offset}-"} if offset else {}
        try:
            body = self._client.get_object(Bucket=self._bucket, Key=full_key, **options)["Body"]
        except boto_errors.ClientError as error:
            if offset and _status(error) == 416:
                return  # the cut came right after the last byte
            raise
        for chunk in body.iter_chunks(_CHUNK_BYTES):
            file.write(chunk)

    def _named(self, key: str) -> str:
        return f"{key} in {self.url}"

    @contextlib.contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except (boto_errors.ClientError, boto_errors.BotoCoreError, boto3.exceptions.Boto3Error) as error:
            raise _translate(error, self._named(key)) from error
        except OSError as error:
            raise Unavailable(f"{self._named(key)}: {error}") from error


_TRANSFER = TransferConfig(
    multipart_threshold=MULTIPART_BYTES,
    multipart_chunksize=_PART_BYTES,
    max_concurrency=_PARTS_AT_ONCE,
)
_STREAM_ERRORS = (
    boto_errors.IncompleteReadError,
    boto_errors.ReadTimeoutError,
    boto_errors.ResponseStreamingError,
)


@contextlib.contextmanager
def _suppressed(codes: Set[str]) -> Iterator[None]:
    try:
        yield
    except boto_errors.ClientError as error:
        if error.response.get("Error", {}).get("Code") not in codes:
            raise


def _client(session: Any, endpoint: str | None, region: str | None, retries: dict[str, object]) -> Any:
    return session.client(
        "s3",
        endpoint_url=endpoint,
        region_name=region,
        config=Config(
            connect_timeout=5,
            read_timeout=20,
            max_pool_connections=16,
            retries=retries,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": "path"},
        ),
    )


def _unix(moment: datetime | None) -> float | None:
    return moment.timestamp() if moment else None


def _md5(body: bytes) -> str:
    return base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()


def _status(error: boto_errors.ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _translate(error: Exception, what: str) -> StorageError:
    """Say what happened, and whether trying again helps."""
    if isinstance(error, boto_errors.ClientError):
        return _translate_answer(error, what)
    if isinstance(error, _MISCONFIGURED):
        return AccessDenied(
            f"{what}: {error}. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or an AWS profile."
        )
    if isinstance(error, _MALFORMED):
        return InvalidName(f"{what}: {error}")
    return Unavailable(f"{what}: {type(error).__name__}: {error}")


def _translate_answer(error: boto_errors.ClientError, what: str) -> StorageError:
    status = _status(error)
    details = error.response.get("Error", {})
    code = str(details.get("Code", status))
    said = f"{what}: the store answered {status} {code}"
    if code in _NOT_FOUND:
        return NotFound(f"{what}: no such object")
    if code in _TRANSIENT or status == 429 or (status >= 500 and status != 501):
        return Unavailable(said)
    message = str(details.get("Message", "")).strip()
    hint = _HINTS.get(code) or (message if message != code else "")
    return AccessDenied(f"{said}{f': {hint}' if hint else ''}")
