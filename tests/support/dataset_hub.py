"""A data set of files, ``owner/name``, as the hub serves it on loopback: enough of it for ``datasets``.

with served(folder) as environment:
    subprocess.run(program, env={**os.environ, **environment})
"""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c" * 40
_API = "/api/datasets/owner/name"
_FILES = f"/datasets/owner/name/resolve/{COMMIT}/"


class _Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        super().__init__(("127.0.0.1", 0), _Requests)


class _Requests(BaseHTTPRequestHandler):
    server: _Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path, folder = unquote(urlsplit(self.path).path), self.server.folder
        files = [_entry(file) for file in sorted(folder.iterdir())]
        if path in (_API, f"{_API}/revision/main", f"{_API}/revision/{COMMIT}"):
            siblings = [{"rfilename": entry["path"]} for entry in files]
            self._json({"id": "owner/name", "sha": COMMIT, "siblings": siblings, "private": False})
        elif path == f"{_API}/tree/{COMMIT}":
            self._json(files)
        elif path.startswith(_FILES) and (file := folder / path.removeprefix(_FILES)).is_file():
            self._send(200, file.read_bytes(), {"ETag": f'"{_entry(file)["oid"]}"', "X-Repo-Commit": COMMIT})
        else:
            missing = "RevisionNotFound" if path.startswith(f"{_API}/revision") else "RepoNotFound"
            known = path.startswith(("/datasets/owner/name/", f"{_API}/tree"))
            self._send(404, b"", {"X-Error-Code": "EntryNotFound" if known else missing})

    def _json(self, body: object) -> None:
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        total = len(body)
        if status == 200 and (asked := self.headers.get("Range")):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            end = min(int(last or total), total - 1)
            headers["Content-Range"] = f"bytes {first}-{end}/{total}"
            status, body = 206, body[int(first) : end + 1]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _entry(file: Path) -> dict[str, object]:
    body = file.read_bytes()
    return {"type": "file", "path": file.name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}


@contextlib.contextmanager
def served(folder: Path, home: Path) -> Iterator[dict[str, str]]:
    """Yield the environment of a process that reads this hub, and keeps what it reads in ``home``."""
    with _Hub(folder) as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            url = f"http://127.0.0.1:{hub.server_address[1]}"
            yield {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
        finally:
            hub.shutdown()
            thread.join()
