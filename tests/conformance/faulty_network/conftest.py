"""Real servers behind a proxy that fails as networks and providers do."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fault_proxy import FaultProxy
from support.faulty import PARTS, Faulty
from support.s3_servers import S3Server

from storage.s3.store import S3Store
from storage.s3.uplink import PART_BYTES
from storage.url import open_store

_corners = itertools.count()


def _faulty(server: S3Server) -> Iterator[Faulty]:
    url = server.url_of(f"faulty-{next(_corners)}")
    with FaultProxy(server.endpoint) as proxy:
        store = open_store(url.replace(server.endpoint, proxy.endpoint))
        assert isinstance(store, S3Store)
        yield Faulty(proxy, store, open_store(url))


@pytest.fixture(params=["rclone", "radosgw"])
def faulty(request: pytest.FixtureRequest) -> Iterator[Faulty]:
    yield from _faulty(request.getfixturevalue(request.param))


@pytest.fixture
def faulty_rclone(rclone: S3Server) -> Iterator[Faulty]:
    yield from _faulty(rclone)


@pytest.fixture
def faulty_radosgw(radosgw: S3Server) -> Iterator[Faulty]:
    yield from _faulty(radosgw)


@pytest.fixture
def big(tmp_path: Path) -> Path:
    path = tmp_path / "big"
    path.write_bytes(os.urandom((PARTS - 1) * PART_BYTES + 12345))
    return path
