"""A download from the hub that breaks off is tried again; a model that is wrong is not."""

import hashlib
import json
import socket
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import EntryNotFoundError, OfflineModeIsEnabled
from support.tiny_world import build_base

from trainer.config import Base
from trainer.errors import BadInput, BaseUnavailable
from trainer.families.source import load_pipeline
from trainer.hub_transfer import broke_off

# What diffusers asks of huggingface_hub in vain.
pytestmark = pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")

COMMIT = "c" * 40
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
"""What the hub under test has trouble with."""


class Hub(ThreadingHTTPServer):
    """One model as the hub serves it; ``trouble`` is what becomes of its weights on the way."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trouble = ""
        super().__init__(("127.0.0.1", 0), _Requests)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Requests(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        files = sorted(p for p in self.server.folder.rglob("*") if p.is_file())
        names = [p.relative_to(self.server.folder).as_posix() for p in files]
        if path.startswith("/api/models/owner/model"):
            entries: list[dict[str, object]] = [{"rfilename": name} for name in names]
            if "/tree/" in path:
                entries = [
                    {"type": "file", "path": n, "size": p.stat().st_size, "oid": "0" * 40}
                    for n, p in zip(names, files, strict=True)
                ]
                return self._send(200, json.dumps(entries).encode())
            return self._send(
                200, json.dumps({"id": "owner/model", "sha": COMMIT, "siblings": entries}).encode()
            )
        _, _, name = path.removeprefix("/owner/model/resolve/").partition("/")
        if name not in names or (self.server.trouble == "missing" and name == WEIGHTS):
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        body = (self.server.folder / name).read_bytes()
        etag = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if name == WEIGHTS and self.command == "GET":
            match self.server.trouble:
                case "reset":
                    return self._send(200, body, etag, cut=True)
                case "busy":
                    return self._send(503, b"")
                case "damaged":
                    body = b"\xff" * len(body)
        return self._send(200, body, etag)

    def _send(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, *, cut: bool = False
    ) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:  # closed with a reset, as by a machine in between that has lost its memory
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True

    def finish(self) -> None:
        if self.connection.fileno() >= 0:
            super().finish()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("hub") / "base")


@pytest.fixture
def hub(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    service = Hub(model)
    thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    # HF_ENDPOINT is read once, at the import.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", service.url)
    template = service.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", service.url)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)  # between its tries
    yield service
    service.shutdown()
    thread.join()
    service.server_close()


def load(cache: Path) -> Any:
    return load_pipeline(Base(model="owner/model"), cache)


def test_a_model_of_the_hub_is_loaded(hub: Hub, tmp_path: Path) -> None:
    assert load(tmp_path).unet is not None


@pytest.mark.parametrize("trouble", ["reset", "busy"])
def test_a_download_that_breaks_off_is_no_wrong_model(hub: Hub, tmp_path: Path, trouble: str) -> None:
    hub.trouble = trouble
    with pytest.raises(BaseUnavailable, match="the hub did not answer"):
        load(tmp_path)

    hub.trouble = ""
    assert load(tmp_path), "it can be tried again"


@pytest.mark.parametrize("trouble", ["missing", "damaged"])
def test_a_wrong_model_of_the_hub_is_one(hub: Hub, tmp_path: Path, trouble: str) -> None:
    hub.trouble = trouble
    with pytest.raises(BadInput, match="cannot be loaded"):
        load(tmp_path)


def xet_get() -> None:
    """Named as the function of huggingface_hub from which hf_xet's errors come."""
    raise RuntimeError("Data processing error: CAS service error")


def test_what_breaks_off_is_known_behind_what_wraps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrapped(cause: Exception) -> OSError:
        error = OSError("can't load the configuration")
        error.__context__ = cause
        return error

    assert broke_off(wrapped(TimeoutError()))
    assert broke_off(OSError("Consistency check failed: file should be of size 9 but has size 3"))
    with pytest.raises(RuntimeError) as caught:
        xet_get()
    assert broke_off(caught.value)
    assert not broke_off(RuntimeError("shapes cannot be multiplied"))
    assert not broke_off(wrapped(EntryNotFoundError("no unet/config.json")))

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert not broke_off(wrapped(OfflineModeIsEnabled()))
