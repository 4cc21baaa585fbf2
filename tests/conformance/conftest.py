"""One S3 server of each kind for the whole session, and each test its own corner of it."""

import itertools
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import pytest
from support.s3_servers import (
    S3Server,
    Tls,
    radosgw_server,
    rclone_server,
    swift_server,
    why_no_radosgw,
    why_no_swift,
)

from storage.directory import DirectoryStore
from storage.object_store import ObjectStore
from storage.url import open_store

_corners = itertools.count()


class Start(Protocol):
    def __call__(self, directory: Path) -> AbstractContextManager[S3Server]: ...


def _serve(start: Start, directory: Path) -> Iterator[S3Server]:
    with start(directory) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server
    shutil.rmtree(directory)  # gigabytes, which pytest would keep for three sessions


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    """One for all servers: a process can trust only one authority beside the usual ones."""
    return Tls.make(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="session")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    yield from _serve(rclone_server, tmp_path_factory.mktemp("rclone"))


@pytest.fixture(scope="session")
def rclone_tls(tmp_path_factory: pytest.TempPathFactory, tls: Tls) -> Iterator[S3Server]:
    yield from _serve(lambda directory: rclone_server(directory, tls), tmp_path_factory.mktemp("rclone-tls"))


@pytest.fixture(scope="session")
def swift(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    if reason := why_no_swift():
        pytest.skip(reason)
    yield from _serve(swift_server, tmp_path_factory.mktemp("swift"))


@pytest.fixture(scope="session")
def radosgw(tmp_path_factory: pytest.TempPathFactory, tls: Tls) -> Iterator[S3Server]:
    if reason := why_no_radosgw():
        pytest.skip(reason)
    yield from _serve(lambda directory: radosgw_server(directory, tls), tmp_path_factory.mktemp("radosgw"))


@pytest.fixture(scope="session")
def radosgw_tls(radosgw: S3Server) -> S3Server:
    return radosgw.over_tls()


KINDS = ["memory", "directory", "rclone", "rclone_tls", "swift", "radosgw", "radosgw_tls"]
ATOMIC = ["memory", "directory", "radosgw", "radosgw_tls"]
"""Those whose create-only has one winner. The others are used as a single writer must use them."""
SERVERS = [kind for kind in KINDS if kind not in {"memory", "directory"}]


def make_store(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    """An empty store of a kind."""
    match kind:
        case "memory":
            return open_store(f"memory://test-{next(_corners)}")
        case "directory":
            return DirectoryStore(tmp_path / "store")
        case _:
            server: S3Server = request.getfixturevalue(kind)
            return open_store(server.url_of(f"test-{next(_corners)}"), check_then_put=kind not in ATOMIC)


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    """Each kind of store in turn."""
    return make_store(request.param, request, tmp_path)


@pytest.fixture(params=ATOMIC)
def atomic_store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    """Each kind of store whose create-only has one winner."""
    return make_store(request.param, request, tmp_path)


@pytest.fixture(params=SERVERS)
def s3_server(request: pytest.FixtureRequest) -> S3Server:
    server: S3Server = request.getfixturevalue(request.param)
    return server
