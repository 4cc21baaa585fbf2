"""A botocore client whose requests keep the thread's deadline, in settings that all servers take.

botocore resolves settings and credentials, builds, signs and parses. Between signing and parsing its
``before-send`` event lets us carry the request: over its own HTTP session, whose connections are made of
sockets that keep ``deadline``, and whose proxies, certificates and pool are botocore's.

The settings: path addressing; no checksum trailers, which two servers refuse over TLS with 411; no retries,
which ``retry`` counts; bodies that are not signed but sent with ``Content-MD5``, a header that is
signed and that rclone, Ceph and Swift verify. A signed sha256 would cost less, but rclone ignores it.
"""

import os
import ssl
from typing import Any
from urllib.parse import urlsplit

import botocore.awsrequest
import botocore.exceptions as boto_errors
import botocore.session
from botocore.config import Config
from botocore.httpsession import URLLib3Session
from botocore.utils import get_environ_proxies

from .deadline import LimitedSocket, LimitedTLSSocket, patience_s

CONNECT_S = 5.0
CONNECTIONS = 16


class S3Client:
    """A client and the credentials that it signs with, as they were found when it was made."""

    def __init__(self, endpoint: str | None, region: str | None) -> None:
        self._session = botocore.session.Session()
        # Servers behind an endpoint of their own ignore the region, but requests are signed for one.
        chosen = region or self._session.get_config_variable("region") or ("us-east-1" if endpoint else None)
        self.requests: Any = self._session.create_client(
            "s3", endpoint_url=endpoint, region_name=chosen, config=_CONFIG
        )
        url = self.requests.meta.endpoint_url
        carrier = _LimitedSession(
            verify=_verification(self._session),
            proxies=self.requests.meta.config.proxies or get_environ_proxies(url),
            timeout=(CONNECT_S, None),
            max_pool_connections=CONNECTIONS,
            client_cert=self.requests.meta.config.client_cert,
            proxies_config=self.requests.meta.config.proxies_config,
        )
        self.requests.meta.events.register("before-send.s3", lambda request, **_: carrier.send(request))
        if (urlsplit(url).hostname or "").endswith(_TIGRIS):
            self.requests.meta.events.register("before-sign.s3", _ask_for_consistency)

    def same_credentials(self, other: "S3Client") -> bool:
        """Whether both would sign alike."""
        try:
            return bool(_frozen(self._session) == _frozen(other._session))
        except boto_errors.BotoCoreError:
            return True  # whatever that means, a new client does not mend it


_TIGRIS = (".tigris.dev", ".storage.dev")


def _ask_for_consistency(request: Any, signature_version: str, **_: Any) -> None:
    """Tigris serves nearby copies, which may be old, unless asked (tigrisdata.com/docs/objects/consistency).

    Presigned requests stay as they are: who sends one would have to send this signed header too.
    """
    if not signature_version.endswith("-query"):
        request.headers["X-Tigris-Consistent"] = "true"


_CONFIG = Config(
    connect_timeout=CONNECT_S,
    max_pool_connections=CONNECTIONS,
    retries={"total_max_attempts": 1},
    signature_version="s3v4",  # else presigned requests get the old one, which signs no headers
    request_checksum_calculation="when_required",
    response_checksum_validation="when_required",
    s3={"addressing_style": "path", "payload_signing_enabled": False},
)


def _verification(session: Any) -> str | bool:
    """What certificates are verified with, chosen as botocore does."""
    chosen: str | bool = (
        session.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE") or True
    )
    return chosen


def _frozen(session: Any) -> object:
    credentials = session.get_credentials()
    return credentials and credentials.get_frozen_credentials()


class _LimitedConnection:
    """Mixed into botocore's connections: connects within the limit, by a socket that keeps it."""

    timeout: float | None

    def _new_conn(self) -> LimitedSocket:
        self.timeout = patience_s(CONNECT_S)
        connected: Any = super()
        return LimitedSocket.taking_over(connected._new_conn())


class _HTTPConnection(_LimitedConnection, botocore.awsrequest.AWSHTTPConnection):  # type: ignore[misc]
    pass


class _HTTPSConnection(_LimitedConnection, botocore.awsrequest.AWSHTTPSConnection):  # type: ignore[misc]
    pass


class _HTTPPool(botocore.awsrequest.AWSHTTPConnectionPool):  # type: ignore[misc]
    ConnectionCls = _HTTPConnection


class _HTTPSPool(botocore.awsrequest.AWSHTTPSConnectionPool):  # type: ignore[misc]
    ConnectionCls = _HTTPSConnection


class _LimitedSession(URLLib3Session):  # type: ignore[misc]
    """botocore's HTTP session over limited connections; a test shows that they are used."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}
        self._manager.pool_classes_by_scheme = self._pool_classes_by_scheme

    def _get_ssl_context(self) -> ssl.SSLContext:
        context: ssl.SSLContext = super()._get_ssl_context()
        context.sslsocket_class = LimitedTLSSocket
        return context
