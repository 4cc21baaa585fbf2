"""Requests to a node's metadata service, and to a service of one's own: small, quick, and never by a proxy.

A proxy would answer for another machine, or send what a cloud tells this one to a stranger.
"""

import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import Message
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPResponse

LINK_LOCAL = "http://169.254.169.254"
"""Where each of the clouds answers its own machines."""

TIMEOUT_S = 2.0
"""For each step of a request."""
LONGEST_S = 5.0
"""An answer that comes in drops must be whole by then."""
MAX_BYTES = 65_536


class Unreachable(Exception):
    """Whoever tells of notices does not answer, or not in its own words: nothing is known."""


class NobodyHere(Unreachable):
    """There is no sign that anybody would ever tell this machine anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A service's answer, whatever its status."""

    status: int
    text: str
    headers: Mapping[str, str]
    """By their names in lower case."""
    at: datetime
    """The service's clock, as far as it says; a node's own may be hours off."""

    def left_s(self, moment: datetime) -> float:
        """Seconds from this answer to a moment that it tells."""
        return (_utc(moment) - self.at).total_seconds()


def ask(url: str, headers: Mapping[str, str] | None = None, *, method: str = "GET") -> Answer:
    """Return what a service answers.

    Raises:
        Unreachable: It does not, in time.
    """
    request = urllib.request.Request(url, headers=dict(headers or {}), method=method)
    opener = urllib.request.OpenerDirector()  # no proxies, no redirects, no status that is an error
    for handler in (urllib.request.HTTPHandler(), urllib.request.HTTPSHandler()):
        opener.add_handler(handler)
    deadline = time.monotonic() + LONGEST_S
    try:
        with opener.open(request, timeout=TIMEOUT_S) as reply:
            return _answer(reply.status, _read(reply, deadline), reply.headers)
    except (OSError, HTTPException, ValueError) as error:  # urllib's errors are OSErrors
        reason = getattr(error, "reason", None) or error
        raise Unreachable(f"{url.partition('?')[0]}: {reason}") from error


def _read(reply: HTTPResponse, deadline: float) -> bytes:
    """The beginning of the body. The timeout of the socket is one for each drop."""
    body = b""
    while len(body) < MAX_BYTES and (drop := reply.read1(MAX_BYTES - len(body))):
        body += drop
        if time.monotonic() > deadline:
            raise TimeoutError(f"the answer was not whole within {LONGEST_S:g} s")
    return body


def _answer(status: int, body: bytes, headers: Message) -> Answer:
    try:
        at = _utc(parsedate_to_datetime(headers["Date"] or ""))
    except ValueError:
        at = datetime.now(UTC)
    names = {name.lower(): value for name, value in headers.items()}
    return Answer(status=status, text=body.decode(errors="replace").strip(), headers=names, at=at)


def _utc(moment: datetime) -> datetime:
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
