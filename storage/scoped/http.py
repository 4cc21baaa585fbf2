"""Sends presigned requests, from a process that has no credentials and needs no S3 client.

Every request has a deadline for all of it (``storage.s3.deadline``), is sent once and follows no redirect.
Errors name the key and never the url, whose query is a secret.
"""

import os
import ssl
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import urllib3
import urllib3.connection
import urllib3.exceptions

from ..errors import AccessDenied, NotFound, Unavailable
from ..s3.deadline import (
    LimitedSocket,
    LimitedTLSSocket,
    answered_within,
    patience_s,
    within,
)
from ..s3.file_slice import FileSlice
from ..s3.presigned import Presigned
from ..s3.uplink import allowance_s, answer_s

REQUEST_S = 60.0
CONNECT_S = 5.0
_CHUNK_BYTES = 1 << 20
_AT_ONCE = 8


class Expired(AccessDenied):
    """The server refused the signature: it has expired, or the credentials behind it have."""


class PresignedHttp:
    """Connections to whatever servers the urls name. Used from any thread."""

    def __init__(self) -> None:
        self._managers: dict[str | None, urllib3.PoolManager] = {}

    def put(self, key: str, signed: Presigned, body: bytes | FileSlice) -> int:
        """Send a body; return the answer's status, which the caller understands.

        Raises:
            Unavailable: There was no answer, or the server cannot now.
        """
        silent = answered_within(answer_s(len(body)))
        with silent, self._sent(key, "PUT", signed, body, len(body)) as answer:
            answer.drain_conn()
            return _checked(key, answer.status)

    def get(self, key: str, signed: Presigned, file: BinaryIO, most_bytes: int) -> None:
        """Append to a file what it does not have of an object yet.

        Raises:
            Expired, NotFound, Unavailable
        """
        offset = file.tell()
        ranged = Presigned(signed.url, {**signed.headers, "Range": f"bytes={offset}-"} if offset else {})
        with self._sent(key, "GET", ranged, None, most_bytes) as answer:
            status = _checked(key, answer.status)
            if status == 416 and offset:
                return  # the cut came right after the last byte
            if status == 403:
                raise Expired(f"{key}: the store refuses the signature")
            if status == 404:
                raise NotFound(f"{key}: no such object")
            if status != (206 if offset else 200):
                raise AccessDenied(f"{key}: the store answered {status}")
            for chunk in answer.stream(_CHUNK_BYTES, decode_content=False):
                if file.tell() + len(chunk) > most_bytes:
                    raise AccessDenied(f"{key}: more than {most_bytes} bytes")
                file.write(chunk)

    @contextmanager
    def _sent(
        self, key: str, method: str, signed: Presigned, body: bytes | FileSlice | None, size: int
    ) -> Iterator[urllib3.BaseHTTPResponse]:
        try:
            with (
                within(REQUEST_S + allowance_s(size, None)),
                closing(
                    self._manager(signed.url).request(
                        method,
                        signed.url,
                        body=body,  # type: ignore[arg-type]  # it has read(), which is all that is used
                        headers=dict(signed.headers),
                        retries=False,
                        redirect=False,
                        preload_content=False,
                        timeout=urllib3.Timeout(connect=CONNECT_S),
                    )
                ) as answer,
            ):
                yield answer
        except (urllib3.exceptions.HTTPError, OSError) as error:
            # Its text may hold the url.
            raise Unavailable(f"{key}: the store does not answer: {type(error).__name__}") from None

    def _manager(self, url: str) -> urllib3.PoolManager:
        proxy = _proxy(url)
        if proxy not in self._managers:
            options: dict[str, Any] = {"maxsize": _AT_ONCE, "ssl_context": _tls()}
            made = urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)
            made.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}
            self._managers[proxy] = made
        return self._managers[proxy]


def _checked(key: str, status: int) -> int:
    if status == 429 or status >= 500:
        raise Unavailable(f"{key}: the store answered {status}")
    return status


def _proxy(url: str) -> str | None:
    parts = urlsplit(url)
    if urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    return urllib.request.getproxies().get(parts.scheme)


def _tls() -> ssl.SSLContext:
    authority = os.environ.get("AWS_CA_BUNDLE") or os.environ.get("REQUESTS_CA_BUNDLE") or None
    context = ssl.create_default_context(cafile=authority)
    context.sslsocket_class = LimitedTLSSocket
    return context


class _Limited:
    """Mixed into a connection: connects within the thread's limit, by a socket that keeps it."""

    timeout: Any

    def _new_conn(self) -> LimitedSocket:
        self.timeout = patience_s(CONNECT_S)
        connected: Any = super()
        return LimitedSocket.taking_over(connected._new_conn())


class _HTTPConnection(_Limited, urllib3.connection.HTTPConnection):
    pass


class _HTTPSConnection(_Limited, urllib3.connection.HTTPSConnection):
    pass


class _HTTPPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _HTTPConnection


class _HTTPSPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _HTTPSConnection
