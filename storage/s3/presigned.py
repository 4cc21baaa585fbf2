"""Presigned requests: what a process without credentials may do, on one key, until the signature expires.

A write is signed together with its length, its MD5 and, where it makes the whole object,
``If-None-Match: *``: the server refuses another length, other bytes, and a second time. Parts of a large file
are signed alike, and put together here, by who holds the credentials. A presigned url is a secret: it is
handed to the one who asked and never logged.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import NotFound, Unavailable
from .deadline import answered_within
from .errors import FOREIGN, NO_UPLOAD, code_of
from .file_slice import content_md5
from .retry import Send
from .uplink import COMPLETE_ANSWER_S, COMPLETE_S


@dataclass(frozen=True, slots=True)
class Presigned:
    """One request that whoever holds it may send, with exactly these headers."""

    url: str
    headers: Mapping[str, str]

    def __repr__(self) -> str:
        return "Presigned(…)"  # a traceback or a log line must not carry it


@dataclass(frozen=True, slots=True)
class Seen:
    """What the server says of an object or of a part."""

    size_bytes: int
    etag: str


class Signer:
    """Signs for one bucket and prefix. Used from any thread.

    Args:
        full_key: The key in the bucket for a key of the store.
    """

    def __init__(self, bucket: str, full_key: Callable[[str], str], request: Send) -> None:
        self._bucket = bucket
        self._full_key = full_key
        self._request = request

    def get(self, key: str, expires_s: int) -> Presigned:
        return Presigned(self._sign("get_object", key, expires_s, {}), {})

    def put(self, key: str, size_bytes: int, md5: str, expires_s: int) -> Presigned:
        """A write of exactly these bytes, where nothing is yet. ``md5`` is in hexadecimal digits."""
        options = {"ContentLength": size_bytes, "ContentMD5": _header(md5), "IfNoneMatch": "*"}
        headers = {"Content-Length": str(size_bytes), "Content-MD5": _header(md5), "If-None-Match": "*"}
        return Presigned(self._sign("put_object", key, expires_s, options), headers)

    def part(
        self, key: str, upload_id: str, number: int, size_bytes: int, md5: str, expires_s: int
    ) -> Presigned:
        options = {
            "UploadId": upload_id,
            "PartNumber": number,
            "ContentLength": size_bytes,
            "ContentMD5": _header(md5),
        }
        headers = {"Content-Length": str(size_bytes), "Content-MD5": _header(md5)}
        return Presigned(self._sign("upload_part", key, expires_s, options), headers)

    def seen(self, key: str) -> Seen | None:
        """What there is at a key, or None."""
        with contextlib.suppress(NotFound):
            answer = self._request(key, lambda client: client.head_object(**self._where(key)))
            return Seen(answer["ContentLength"], answer.get("ETag", "").strip('"'))
        return None

    def begin(self, key: str) -> str:
        """Begin an upload in parts; return its id."""
        answer = self._request(key, lambda client: client.create_multipart_upload(**self._where(key)))
        if not (upload_id := answer.get("UploadId")):
            raise Unavailable(f"{key}: the server does not name the upload that it began")
        return str(upload_id)

    def parts(self, key: str, upload_id: str) -> dict[int, Seen]:
        """The parts that have arrived.

        Raises:
            NotFound: The server does not know the upload (any more).
        """

        def listed(client: Any) -> dict[int, Seen]:
            with _known(key):
                pages = client.get_paginator("list_parts").paginate(UploadId=upload_id, **self._where(key))
                return {
                    part["PartNumber"]: Seen(part["Size"], part.get("ETag", "").strip('"'))
                    for page in pages
                    for part in page.get("Parts", ())
                }

        return self._request(key, listed)

    def complete(self, key: str, upload_id: str, etags: Mapping[int, str]) -> None:
        """Make the object of these parts.

        Raises:
            NotFound: The server does not know the upload (any more): perhaps because it is complete.
        """
        parts = [{"PartNumber": number, "ETag": etag} for number, etag in sorted(etags.items())]

        def completed(client: Any) -> None:
            with _known(key), answered_within(COMPLETE_ANSWER_S):
                client.complete_multipart_upload(
                    UploadId=upload_id, MultipartUpload={"Parts": parts}, **self._where(key)
                )

        self._request(key, completed, allow_s=COMPLETE_S)

    def abort(self, key: str, upload_id: str) -> None:
        """Drop an upload and its parts; one that is not there is dropped already."""

        def aborted(client: Any) -> None:
            with _known(key):
                client.abort_multipart_upload(UploadId=upload_id, **self._where(key))

        with contextlib.suppress(NotFound):
            self._request(key, aborted)

    def _sign(self, operation: str, key: str, expires_s: int, options: Mapping[str, object]) -> str:
        parameters = {**self._where(key), **options}

        def signed(client: Any) -> str:
            # Nothing is sent: but credentials may have to be read, or renewed.
            return str(client.generate_presigned_url(operation, Params=parameters, ExpiresIn=expires_s))

        return self._request(key, signed)

    def _where(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._full_key(key)}


@contextlib.contextmanager
def _known(key: str) -> Iterator[None]:
    try:
        yield
    except FOREIGN as error:
        if code_of(error) in NO_UPLOAD:
            raise NotFound(f"{key}: the upload is not there any more") from error
        raise


def _header(md5: str) -> str:
    return content_md5(bytes.fromhex(md5))
