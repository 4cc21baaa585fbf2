"""An HTTP proxy before a real S3 server that does to requests what networks and providers do.

    with FaultProxy(server.endpoint) as proxy:
        store = open_store(server.url.replace(server.endpoint, proxy.endpoint))
        proxy.inject(Status(503, "SlowDown"), times=2)                    # the next two requests
        proxy.inject(LoseReply(), when=matching("PUT", "log/"))           # the next PUT of a key with "log/"
        proxy.inject(StripHeader("If-None-Match"), times=FOREVER)         # every request from now on
        proxy.inject(Status(503, "SlowDown"), when=matching("DELETE"), times=FOREVER)
        ...
        proxy.heal()                                                      # no faults any more
        proxy.requests                                                    # what came, with bytes and answers

The first injected fault that fits a request and is not used up is what happens to it; other requests are
passed on unchanged, so their signatures hold: a client signs the proxy's host and port, and the servers
accept a ``Host`` of another name. ``uplink_bytes_per_s`` shapes what all connections send together, as a slow
uplink does. One request after the other on a connection, bodies with a ``Content-Length``, plain http only.

Everything under a fault waits for no clock but a shaped or trickling transfer's own: a black hole ends when
the proxy does, or when it is healed.
"""

import contextlib
import http.client
import io
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self
from urllib.parse import unquote, urlsplit

from support.faults import (
    BlackHole,
    CorruptUp,
    Fault,
    LoseReply,
    Matches,
    ResetUp,
    Seen,
    StaleAnswer,
    Status,
    StripHeader,
    TrickleDown,
    TrickleUp,
    TruncateDown,
)

_CHUNK_BYTES = 16 << 10
_BURST_BYTES = 64 << 10
_SMALL_BUFFER_BYTES = 64 << 10
"""What a kernel may hold on the way in: with more, a slow link looks fast to whoever sends little."""


@dataclass(slots=True)
class _Injected:
    fault: Fault
    when: Matches
    left: int


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes


class FaultProxy:
    """Listens on a loopback port of its own while it is entered."""

    def __init__(self, upstream: str, *, uplink_bytes_per_s: float | None = None) -> None:
        parts = urlsplit(upstream)
        self._upstream = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._uplink = _Pace(uplink_bytes_per_s) if uplink_bytes_per_s else None
        self._lock = threading.Lock()
        self._faults: list[_Injected] = []
        self._first_answers: dict[tuple[str, str], _Answer] = {}
        self._clients: set[socket.socket] = set()
        self._closed = threading.Event()
        self._healed = threading.Event()
        self._listener = socket.socket()
        self.requests: list[Seen] = []
        """In the order in which they came."""

    def __enter__(self) -> Self:
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL_BUFFER_BYTES)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(128)
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, name="fault-proxy", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._healed.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            clients = list(self._clients)
        for client in clients:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def inject(self, fault: Fault, *, when: Matches = lambda seen: True, times: int = 1) -> None:
        """Let a fault happen to the next requests that match."""
        with self._lock:
            self._healed.clear()
            self._faults.append(_Injected(fault, when, times))

    def heal(self) -> None:
        """Forget all faults, and let go what is held in a black hole."""
        with self._lock:
            self._faults.clear()
        self._healed.set()

    @property
    def received_bytes(self) -> int:
        """Of all bodies together, from clients."""
        return sum(seen.received_bytes for seen in self.requests)

    def count(self, when: Matches) -> int:
        """How many requests came that match."""
        return sum(1 for seen in list(self.requests) if when(seen))

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self._clients.add(client)
            threading.Thread(target=self._serve, args=(client,), name="fault-proxy", daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server = http.client.HTTPConnection(*self._upstream)
        try:
            with client, client.makefile("rb") as reader:
                while self._exchange(client, reader, server):
                    pass
        except (OSError, http.client.HTTPException):
            pass  # one of both sides is gone: so is the connection
        finally:
            server.close()
            with self._lock:
                self._clients.discard(client)

    def _exchange(
        self, client: socket.socket, reader: io.BufferedIOBase, server: http.client.HTTPConnection
    ) -> bool:
        """Carry one request; False if the connection is to be closed."""
        line = reader.readline()
        if not line.strip():
            return False
        method, target, _ = line.decode("latin-1").split()
        headers = http.client.parse_headers(reader)
        seen = Seen(method, unquote(target), dict(headers.items()), time.monotonic())
        seen.fault = self._fault_for(seen)
        length = int(headers.get("Content-Length", 0))
        match seen.fault:
            case Status(status, code, extra):
                body = f"<Error><Code>{code}</Code><Message>by the proxy</Message></Error>".encode()
                expects = headers.get("Expect", "").lower() == "100-continue"
                own = [("Content-Type", "application/xml"), *([("Connection", "close")] if expects else [])]
                answer = _Answer(status, [*extra.items(), *own], body)
                if not expects:
                    for _ in self._body(reader, length, seen):
                        pass
                self._answer(client, seen, answer)
                return not expects
            case BlackHole():
                self._healed.wait()
                return False
            case StaleAnswer() if kept := self._first_answers.get((method, target)):
                self._answer(client, seen, kept)
                return True
        if headers.get("Expect", "").lower() == "100-continue":
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if not self._forward(reader, length, target, headers.items(), server, seen):
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return False
        return self._relay(client, target, server, seen)

    def _fault_for(self, seen: Seen) -> Fault | None:
        with self._lock:
            self.requests.append(seen)
            for injected in self._faults:
                if injected.left > 0 and injected.when(seen):
                    injected.left -= 1
                    return injected.fault
        return None

    def _forward(
        self,
        reader: io.BufferedIOBase,
        length: int,
        target: str,
        headers: list[tuple[str, str]],
        server: http.client.HTTPConnection,
        seen: Seen,
    ) -> bool:
        """Pass a request on; False if it was reset on the way."""
        dropped = {"expect"}
        if isinstance(seen.fault, StripHeader):
            dropped.add(seen.fault.name.lower())
        server.putrequest(seen.method, target, skip_host=True, skip_accept_encoding=True)
        for name, value in headers:
            if name.lower() not in dropped:
                server.putheader(name, value)
        server.endheaders()
        refused = False
        for chunk in self._body(reader, length, seen):
            try:
                if not refused:
                    server.send(chunk)
            except OSError:
                refused = True  # it may have answered already
        return seen.received_bytes >= length

    def _body(self, reader: io.BufferedIOBase, length: int, seen: Seen) -> Iterator[bytes]:
        trickle = _Pace(seen.fault.bytes_per_s, burst=1) if isinstance(seen.fault, TrickleUp) else None
        until = min(length, seen.fault.after_bytes) if isinstance(seen.fault, ResetUp) else length
        while seen.received_bytes < until and not self._closed.is_set():
            wanted = min(1 if trickle else _CHUNK_BYTES, until - seen.received_bytes)
            for pace in filter(None, (trickle, self._uplink)):
                pace.take(wanted)
            # Counted as it comes in, so that a cut shows what had come until then.
            chunk = reader.read(wanted)
            if isinstance(seen.fault, CorruptUp) and seen.received_bytes == 0:
                chunk = bytes([chunk[0] ^ 1]) + chunk[1:]
            seen.received_bytes += len(chunk)
            if len(chunk) < wanted:
                raise ConnectionError("the client is gone")
            yield chunk

    def _relay(
        self, client: socket.socket, target: str, server: http.client.HTTPConnection, seen: Seen
    ) -> bool:
        response = server.getresponse()
        dropped = {"transfer-encoding", "connection", "content-length"}
        headers = [(name, value) for name, value in response.getheaders() if name.lower() not in dropped]
        if isinstance(seen.fault, LoseReply):
            response.read()
            return False
        if seen.method == "HEAD" or response.length is None or response.length < _BURST_BYTES:
            declared = response.getheader("Content-Length")
            answer = _Answer(response.status, headers, response.read())
            self._first_answers.setdefault((seen.method, target), answer)
            self._answer(client, seen, answer, declared)
        else:
            seen.answered = response.status
            length = response.length
            client.sendall(_head(response.status, headers, str(length)))
            sent = 0
            while chunk := response.read(_CHUNK_BYTES * 16):
                sent += self._send_down(client, chunk, seen, sent)
        return not isinstance(seen.fault, TruncateDown)

    def _answer(
        self, client: socket.socket, seen: Seen, answer: _Answer, declared: str | None = None
    ) -> None:
        seen.answered = answer.status
        length = declared if seen.method == "HEAD" and declared else str(len(answer.body))
        head = _head(answer.status, answer.headers, length)
        body = b"" if seen.method == "HEAD" else answer.body
        if isinstance(seen.fault, TrickleDown):
            self._send_down(client, head + body, seen, 0)
        else:
            client.sendall(head)
            self._send_down(client, body, seen, 0)

    def _send_down(self, client: socket.socket, data: bytes, seen: Seen, sent: int) -> int:
        match seen.fault:
            case TrickleDown(rate):
                pace = _Pace(rate, burst=1)
                for byte in data:
                    if self._closed.is_set():
                        raise ConnectionError("the proxy is closed")
                    pace.take(1)
                    client.sendall(bytes([byte]))
            case TruncateDown(after_bytes):
                client.sendall(data[: max(0, after_bytes - sent)])
                if sent + len(data) >= after_bytes:
                    raise ConnectionError("truncated")
            case _:
                client.sendall(data)
        return len(data)


class _Pace:
    """A token bucket that all who share it wait for."""

    def __init__(self, bytes_per_s: float, burst: int = _BURST_BYTES) -> None:
        self._rate = bytes_per_s
        self._burst_s = burst / bytes_per_s
        self._lock = threading.Lock()
        self._free_at = time.monotonic()

    def take(self, count: int) -> None:
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now - self._burst_s) + count / self._rate
            wait_s = self._free_at - now
        if wait_s > 0:
            time.sleep(wait_s)


def _head(status: int, headers: list[tuple[str, str]], length: str) -> bytes:
    reason = http.client.responses.get(status, "")
    lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in headers)]
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode("latin-1")
