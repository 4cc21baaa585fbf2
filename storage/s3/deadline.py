"""A limit on how long a thread may spend on the network, and sockets that keep it.

    with within(60.0):
        store.put(key, body)        # raises Unavailable after a minute, whatever the server does

A read timeout begins anew with every byte that arrives, so a server that trickles holds a client for ever.
The sockets here ask, before each operation, how much of the thread's limit is left. Limits nest: the nearest
one holds. Nothing may stand still for long either, except a server that has been given work to do
(``answered_within``). A thread that works for another one enters the limit that it was given (``current``).

What is not limited: the resolver, which has its own (some seconds for each name server).
"""

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from typing import Any

IDLE_S = 20.0
"""Nothing may take longer than this to move on, limit or not, unless ``answered_within`` says so."""

_here = threading.local()


class DeadlineExceeded(TimeoutError):
    """The time that was given is used up."""


@contextlib.contextmanager
def within(limit_s: float) -> Iterator[None]:
    """Limit what this thread does on the network inside the block to so many seconds from now."""
    with until(time.monotonic() + limit_s):
        yield


@contextlib.contextmanager
def until(deadline: float | None) -> Iterator[None]:
    """Limit it to a moment, in monotonic seconds: one that another thread was given."""
    outer = current()
    moments = [moment for moment in (outer, deadline) if moment is not None]
    _here.deadline = min(moments, default=None)
    try:
        yield
    finally:
        _here.deadline = outer


def current() -> float | None:
    """When this thread's time is up, in monotonic seconds; None if it has no limit."""
    deadline: float | None = getattr(_here, "deadline", None)
    return deadline


def left_s() -> float:
    """Seconds that this thread has left, infinite if it has no limit."""
    deadline = current()
    return float("inf") if deadline is None else deadline - time.monotonic()


@contextlib.contextmanager
def answered_within(longest_s: float) -> Iterator[None]:
    """Let a server be silent for so long while it works on what this block sends. Sending stays as it is."""
    outer = answer_s()
    _here.answer_s = longest_s
    try:
        yield
    finally:
        _here.answer_s = outer


def answer_s() -> float:
    """How long this thread waits for the next bytes of an answer."""
    waits_s: float = getattr(_here, "answer_s", IDLE_S)
    return waits_s


def patience_s(longest_s: float = IDLE_S) -> float:
    """How long the next step may take.

    Raises:
        DeadlineExceeded: No time is left.
    """
    left = left_s()
    if left <= 0:
        raise DeadlineExceeded("not done in the time that it was given")
    return min(left, longest_s)


class _Limited:
    """Mixed into a socket class: every operation that can block gets the time that is left."""

    def recv_into(self, *arguments: Any, **options: Any) -> int:
        received: int = self._limited("recv_into", *arguments, **options)
        return received

    def recv(self, *arguments: Any, **options: Any) -> bytes:
        received: bytes = self._limited("recv", *arguments, **options)
        return received

    def send(self, *arguments: Any, **options: Any) -> int:
        sent: int = self._limited("send", *arguments, **options)
        return sent

    def sendall(self, data: Any, flags: int = 0) -> None:
        # In a loop of its own: what is slow but goes on is not idle.
        with memoryview(data) as view, view.cast("B") as rest:
            sent = 0
            while sent < len(rest):
                sent += self.send(rest[sent:], flags)

    def _limited(self, operation: str, *arguments: Any, **options: Any) -> Any:
        limited: Any = self
        patience = patience_s(IDLE_S if operation == "send" else answer_s())
        if limited.gettimeout() != patience:  # else a system call for every few kilobytes
            limited.settimeout(patience)
        try:
            return getattr(super(), operation)(*arguments, **options)
        except TimeoutError:
            patience_s()  # says so, if it was the limit
            raise


class LimitedSocket(_Limited, socket.socket):
    """A plain socket that keeps the thread's limit."""

    @classmethod
    def taking_over(cls, sock: socket.socket) -> "LimitedSocket":
        """The same connection; the given object is not to be used any more."""
        return cls(sock.family, sock.type, sock.proto, fileno=sock.detach())


class LimitedTLSSocket(_Limited, ssl.SSLSocket):
    """For ``SSLContext.sslsocket_class``."""

    def do_handshake(self, block: bool = False) -> None:
        self.settimeout(patience_s())
        try:
            super().do_handshake(block)
        except TimeoutError:
            patience_s()
            raise
