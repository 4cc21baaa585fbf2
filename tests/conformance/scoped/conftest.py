"""A grant desk on a server that enforces what is signed."""

import itertools
from collections.abc import Iterator

import pytest
from support.granting import Office
from support.s3_servers import S3Server

from storage.url import open_store

_corners = itertools.count()


@pytest.fixture
def office(radosgw: S3Server) -> Iterator[Office]:
    made = Office(open_store(radosgw.url_of(f"scoped-{next(_corners)}")))
    yield made
    leftover = [info.key for info in made.store.unfinished("")]
    assert leftover == [], "uploads that nobody completed or aborted"
