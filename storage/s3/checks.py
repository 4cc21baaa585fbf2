"""Requests that only an examination of a bucket makes: what its server does with parts and checksums."""

import contextlib
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import botocore.session
from botocore.config import Config

from .. import layout
from .client import S3Client
from .deadline import within
from .errors import (
    FOREIGN,
    code_of,
    status_of,
    translate,
)
from .file_slice import md5_of

_PATIENCE_S = 30.0


class Bucket:
    """The bucket and prefix of a store's url, met without ``S3Store``'s repetitions.

    Raises:
        AccessDenied, InvalidName, Unavailable: From every method, as from a store's.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query))
        self._url = url
        self._bucket = parts.netloc
        self._prefix = f"{parts.path.strip('/')}/" if parts.path.strip("/") else ""
        self._endpoint, self._region = options.get("endpoint"), options.get("region")
        with self._translated("settings"):
            self._ours = S3Client(self._endpoint, self._region).requests

    @property
    def secure(self) -> bool:
        return str(self._ours.meta.endpoint_url).startswith("https:")

    def begin_upload(self, key: str) -> None:
        """Leave what a writer leaves that dies in the middle of a multipart upload."""
        with self._translated(key):
            self._part(self._begin(key), key, b"never finished")

    def upload_in_parts(self, key: str, body: bytes) -> None:
        """Write an object as large files are written."""
        with self._translated(key):
            upload_id = self._begin(key)
            part = {"PartNumber": 1, "ETag": self._part(upload_id, key, body)}
            self._ours.complete_multipart_upload(
                **self._at(key), UploadId=upload_id, MultipartUpload={"Parts": [part]}
            )

    def refuses_damage(self, key: str) -> bool:
        """Whether a body that does not fit its ``Content-MD5`` is refused."""
        with self._translated(key):
            try:
                self._ours.put_object(
                    **self._at(key), Body=b"damaged on the way", ContentMD5=md5_of(b"other")
                )
            except FOREIGN as error:
                if status_of(error) != 400:
                    raise
                return True
        return False

    def refusal_of_trailers(self, key: str) -> str | None:
        """What the server answers to a body with the checksum trailers that the SDK sends by default.

        None if it takes them.
        """
        session = botocore.session.Session()
        default = Config(
            connect_timeout=5,
            read_timeout=_PATIENCE_S,
            retries={"total_max_attempts": 1},
            request_checksum_calculation="when_supported",
            s3={"addressing_style": "path"},
        )
        with self._translated(key):
            client = session.create_client(
                "s3",
                endpoint_url=self._endpoint,
                region_name=self._ours.meta.region_name,
                config=default,
            )
            try:
                client.put_object(**self._at(key), Body=b"with a trailer")
            except FOREIGN as error:
                # Too long for that server to answer is no answer to the question.
                if not 400 <= status_of(error) <= 501 or status_of(error) in {403, 429, 500}:
                    raise
                return f"{status_of(error)} {code_of(error)}".strip()
        return None

    def _begin(self, key: str) -> str:
        return str(self._ours.create_multipart_upload(**self._at(key))["UploadId"])

    def _part(self, upload_id: str, key: str, body: bytes) -> str:
        answer = self._ours.upload_part(
            **self._at(key), UploadId=upload_id, PartNumber=1, Body=body, ContentMD5=md5_of(body)
        )
        return str(answer["ETag"])

    def _at(self, key: str) -> dict[str, Any]:
        return {"Bucket": self._bucket, "Key": layout.check_path(self._prefix + layout.check_path(key))}

    @contextlib.contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        try:
            with within(_PATIENCE_S):
                yield
        except FOREIGN as error:
            raise translate(error, f"{key} in {self._url}") from error
