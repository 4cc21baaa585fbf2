"""A metadata service of a cloud's node, at any address: it tells of a node's end while a file says so.

    python tests/support/fake_metadata.py aws 169.254.169.254 80 /tmp/n1/notice.json

    announce(Path("/tmp/n1/notice.json"), 120)      from now on the node ends in 120 s
    withdraw(Path("/tmp/n1/notice.json"))           it does not

The file is read at every request, so the server may live in another process or network namespace. Providers:
``aws`` (IMDSv2: no answer without a token), ``gcp``, ``azure``, and ``url`` for a service of one's own.
"""

import contextlib
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PROVIDERS = ("aws", "gcp", "azure", "url")
INSTANCE = "i-0abcdef1234567890"
VM = "vm-7"

Answer = tuple[int, str]


def announce(state: Path, in_s: float, kind: str = "terminate") -> None:
    """Let the server tell that the node ends in so many seconds. Kinds: terminate, rebalance, maintenance."""
    temporary = state.with_name(f"{state.name}.tmp")
    temporary.write_text(json.dumps({"kind": kind, "at": time.time() + in_s}))
    os.replace(temporary, state)


def withdraw(state: Path) -> None:
    """Let the server tell of nothing any more."""
    state.unlink(missing_ok=True)


class FakeMetadata(ThreadingHTTPServer):
    """One node's metadata service."""

    daemon_threads = True

    def __init__(self, provider: str, state: Path, host: str = "127.0.0.1", port: int = 0) -> None:
        if provider not in PROVIDERS:
            raise ValueError(f"provider must be one of {', '.join(PROVIDERS)}, got {provider!r}")
        self.provider = provider
        self.state = state
        self.tokens: set[str] = set()
        self.requests: list[str] = []
        """What was asked for, as ``GET /path``."""
        self.skew_s = 0.0
        """How far this service's clock, by which it announces, is ahead of the machine's."""
        self.broken = False
        """Answer 503 to everything."""
        self.broken_paths: tuple[str, ...] = ()
        """Answer 503 to paths that end so."""
        self.silent_paths: tuple[str, ...] = ()
        """Close the connection on paths that end so."""
        super().__init__((host, port), _Requests)

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}"

    def notice(self) -> dict[str, Any] | None:
        """What the file says, or None."""
        try:
            told: dict[str, Any] = json.loads(self.state.read_text())
        except FileNotFoundError:
            return None
        return told

    def moment(self, at: float) -> datetime:
        return datetime.fromtimestamp(at + self.skew_s, UTC)


class _Requests(BaseHTTPRequestHandler):
    server: FakeMetadata

    def do_PUT(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        service = self.server
        path = self.path.partition("?")[0]
        service.requests.append(f"{self.command} {path}")
        play = {"aws": self._aws, "gcp": self._gcp, "azure": self._azure, "url": self._url}[service.provider]
        if path.endswith(service.silent_paths):
            self.close_connection = True
            return
        broken = service.broken or path.endswith(service.broken_paths)
        status, text = (503, "try later") if broken else play(path, service.notice())
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if service.provider == "gcp":
            self.send_header("Metadata-Flavor", "Google")
        self.end_headers()
        self.wfile.write(body)

    def _aws(self, path: str, told: dict[str, Any] | None) -> Answer:
        if path == "/latest/api/token":
            if self.command != "PUT" or not self.headers.get("X-aws-ec2-metadata-token-ttl-seconds"):
                return 400, ""
            token = secrets.token_urlsafe(24)
            self.server.tokens.add(token)
            return 200, token
        if self.headers.get("X-aws-ec2-metadata-token") not in self.server.tokens:
            return 401, ""
        kind = told["kind"] if told else None
        match path:
            case "/latest/meta-data/instance-id":
                return 200, INSTANCE
            case "/latest/meta-data/spot/instance-action" if told and kind == "terminate":
                return 200, json.dumps({"action": "terminate", "time": self._iso(told["at"])})
            case "/latest/meta-data/events/recommendations/rebalance" if told and kind == "rebalance":
                return 200, json.dumps({"noticeTime": self._iso(time.time())})
        return 404, ""

    def _gcp(self, path: str, told: dict[str, Any] | None) -> Answer:
        if self.headers.get("Metadata-Flavor") != "Google":
            return 403, "Missing Metadata-Flavor:Google header."
        kind = told["kind"] if told else None
        match path:
            case "/computeMetadata/v1/instance/preempted":
                return 200, "TRUE" if kind == "terminate" else "FALSE"
            case "/computeMetadata/v1/instance/maintenance-event":
                return 200, "TERMINATE_ON_HOST_MAINTENANCE" if kind == "maintenance" else "NONE"
            case "/computeMetadata/v1/instance/name":
                return 200, VM
        return 404, ""

    def _azure(self, path: str, told: dict[str, Any] | None) -> Answer:
        if self.headers.get("Metadata") != "true" or "api-version=" not in self.path:
            return 400, '{"error": "Bad request. Required metadata header not specified"}'
        match path:
            case "/metadata/instance/compute/name":
                return 200, VM
            case "/metadata/scheduledevents":
                events = [self._azure_event("Preempt", told["at"], "vm-of-somebody-else")] if told else []
                if told:
                    kind = {"terminate": "Preempt", "maintenance": "Redeploy"}.get(told["kind"], "Freeze")
                    events.append(self._azure_event(kind, told["at"], VM))
                return 200, json.dumps({"DocumentIncarnation": len(events), "Events": events})
        return 404, ""

    def _azure_event(self, kind: str, at: float, vm: str) -> dict[str, Any]:
        return {
            "EventId": f"event-{vm}",
            "EventStatus": "Scheduled",
            "EventType": kind,
            "ResourceType": "VirtualMachine",
            "Resources": [vm],
            "NotBefore": format_datetime(self.server.moment(at), usegmt=True),
            "Description": "",
            "EventSource": "Platform",
            "DurationInSeconds": -1,
        }

    def _url(self, path: str, told: dict[str, Any] | None) -> Answer:
        if told is None:
            return 404, ""
        return 200, json.dumps({"seconds": round(told["at"] - time.time(), 3), "detail": "the host is sold"})

    def _iso(self, at: float) -> str:
        return self.server.moment(at).strftime("%Y-%m-%dT%H:%M:%SZ")

    def date_time_string(self, timestamp: float | None = None) -> str:
        """The ``Date`` of every answer."""
        return format_datetime(self.server.moment(time.time()), usegmt=True)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextlib.contextmanager
def metadata_service(provider: str, state: Path) -> Iterator[FakeMetadata]:
    """A service on a free port of this machine, served by a thread."""
    service = FakeMetadata(provider, state)
    thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield service
    finally:
        service.shutdown()
        thread.join()
        service.server_close()


def main() -> None:
    provider, host, port, state = sys.argv[1:]
    FakeMetadata(provider, Path(state), host, int(port)).serve_forever()


if __name__ == "__main__":
    main()
