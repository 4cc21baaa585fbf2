"""What the transport does when network or provider misbehave, shown through a proxy on real servers."""

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.fault_proxy import (
    FOREVER,
    BlackHole,
    CorruptUp,
    Fault,
    FaultProxy,
    LoseReply,
    ResetUp,
    Seen,
    Status,
    StripHeader,
    TrickleDown,
    TrickleUp,
    TruncateDown,
    matching,
)
from support.s3_servers import S3Server

from storage.errors import AccessDenied, StorageError, Unavailable
from storage.object_store import ObjectStore
from storage.probe import race_probe
from storage.s3.deadline import within
from storage.s3.retry import BUDGET, TRIES
from storage.s3.store import S3Store
from storage.s3.uplink import PART_BYTES
from storage.url import open_store

PARTS = 5
_corners = itertools.count()

part_puts = matching("PUT", "partNumber=")


@dataclass(frozen=True)
class Faulty:
    """A corner of a server, once through the proxy and once not."""

    proxy: FaultProxy
    store: S3Store
    direct: ObjectStore


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


def is_there(faulty: Faulty, key: str, path: Path, tmp_path: Path) -> bool:
    faulty.direct.download(key, tmp_path / "copy")
    return (tmp_path / "copy").read_bytes() == path.read_bytes()


def finished_parts(proxy: FaultProxy) -> list[str]:
    """The parts that the server took, as their requests name them."""
    return sorted(
        seen.path.split("partNumber=")[1].split("&")[0]
        for seen in proxy.requests
        if part_puts(seen) and seen.answered == 200
    )


@pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (500, "InternalError"), (429, "TooMany")])
def test_a_burst_of_refusals_is_waited_out(faulty_rclone: Faulty, status: int, code: str) -> None:
    faulty_rclone.proxy.inject(Status(status, code), times=TRIES - 1)
    faulty_rclone.store.put("k", b"x")
    assert [seen.answered for seen in faulty_rclone.proxy.requests] == [status] * (TRIES - 1) + [200]
    assert faulty_rclone.direct.get("k") == b"x"


def test_a_store_that_is_down_is_not_stormed(faulty_rclone: Faulty) -> None:
    proxy, store = faulty_rclone.proxy, faulty_rclone.store
    proxy.inject(Status(503, "SlowDown"), times=FOREVER)
    calls = 12
    for n in range(calls):
        with pytest.raises(Unavailable):
            store.put(f"k{n}", b"x")
    assert len(proxy.requests) <= calls + BUDGET

    proxy.heal()
    proxy.requests.clear()
    for n in range(calls):
        store.put(f"k{n}", b"x")
    assert len(proxy.requests) == calls


def test_the_server_is_left_alone_for_as_long_as_it_asks(faulty_rclone: Faulty) -> None:
    proxy, store = faulty_rclone.proxy, faulty_rclone.store
    proxy.inject(Status(503, "SlowDown", {"Retry-After": "1"}))
    store.put("k", b"x")
    first, second = proxy.requests
    assert second.at - first.at >= 1

    proxy.inject(Status(503, "SlowDown", {"Retry-After": "3600"}))
    with pytest.raises(Unavailable):
        store.put("k", b"y")
    assert len(proxy.requests) == 3, "an hour is more than a call has"


def test_a_put_whose_answer_is_lost_is_repeated(faulty: Faulty) -> None:
    faulty.proxy.inject(LoseReply())
    faulty.store.put("k", b"x")
    assert len(faulty.proxy.requests) == 2
    assert faulty.direct.get("k") == b"x"


def test_a_create_whose_answer_is_lost_is_sent_once_and_its_outcome_is_unknown(
    faulty_radosgw: Faulty,
) -> None:
    faulty_radosgw.proxy.inject(LoseReply())
    with pytest.raises(Unavailable):
        faulty_radosgw.store.create("k", b"x")
    assert len(faulty_radosgw.proxy.requests) == 1
    assert faulty_radosgw.direct.get("k") == b"x"
    assert faulty_radosgw.store.create("k", b"y") is False


def test_a_completion_whose_answer_is_lost_is_recognised(faulty: Faulty, big: Path, tmp_path: Path) -> None:
    faulty.proxy.inject(LoseReply(), when=matching("POST", "uploadId="))
    faulty.store.put("k", big)
    assert is_there(faulty, "k", big, tmp_path)
    assert faulty.proxy.count(part_puts) == PARTS, "nothing was sent twice"
    assert list(faulty.direct.unfinished("")) == []


def test_a_download_that_is_cut_short_goes_on(faulty: Faulty, big: Path, tmp_path: Path) -> None:
    faulty.direct.put("k", big)
    faulty.proxy.inject(TruncateDown(10 << 20), times=2)
    faulty.store.download("k", tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == big.read_bytes()
    assert "Range" not in faulty.proxy.requests[0].headers
    assert all("Range" in seen.headers for seen in faulty.proxy.requests[1:])
    assert len(faulty.proxy.requests) == 3


def test_an_object_that_changes_during_a_download_is_not_mixed(
    faulty: Faulty, big: Path, tmp_path: Path
) -> None:
    faulty.direct.put("k", big)
    other = os.urandom(9 << 20)

    def replaces(seen: Seen) -> bool:
        faulty.direct.put("k", other)
        return True

    faulty.proxy.inject(TruncateDown(1 << 20))
    # Before the request for the rest is passed on, the object is replaced.
    faulty.proxy.inject(Status(503, "SlowDown"), when=replaces)
    faulty.store.download("k", tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == other


def test_a_small_answer_that_is_cut_short_is_asked_for_again(faulty: Faulty) -> None:
    faulty.direct.put("k", b"0123456789")
    faulty.proxy.inject(TruncateDown(4))
    assert faulty.store.get("k") == b"0123456789"
    faulty.proxy.inject(TruncateDown(1), times=FOREVER)
    with pytest.raises(Unavailable):
        faulty.store.get("k")


def test_a_write_that_is_reset_leaves_no_part_of_an_object(faulty: Faulty, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(os.urandom(3 << 20))
    faulty.proxy.inject(ResetUp(1 << 20), times=FOREVER)
    with pytest.raises(Unavailable):
        faulty.store.put("k", tmp_path / "file")
    assert faulty.direct.head("k") is None
    faulty.proxy.heal()
    faulty.store.put("k", tmp_path / "file")
    assert is_there(faulty, "k", tmp_path / "file", tmp_path)


@pytest.mark.parametrize("sent", ["bytes", "a small file", "in parts", "whole"])
def test_bytes_that_change_on_the_way_are_noticed_and_sent_again(
    sent: str, faulty: Faulty, big: Path, tmp_path: Path
) -> None:
    (tmp_path / "small").write_bytes(os.urandom(1000))
    path = tmp_path / "small" if sent in {"bytes", "a small file"} else big
    if sent == "whole":
        faulty.store._uploads._uplink.carried(1 << 40, 1.0)
    faulty.proxy.inject(CorruptUp(), when=matching("PUT"))
    try:
        faulty.store.put("k", path.read_bytes() if sent == "bytes" else path)
    except Unavailable:
        assert sent == "in parts", "rclone gives up a whole upload for one bad part"
        faulty.store.put("k", path)
    assert is_there(faulty, "k", path, tmp_path)
    assert faulty.proxy.count(matching("PUT")) == 2 or sent == "in parts"
    if sent == "whole":
        assert ["Content-MD5" in seen.headers for seen in faulty.proxy.requests] == [False, True]


SENDING = ("put", "put a file", "create")
CALLS = (*SENDING, "get", "download", "list", "head", "delete")


@pytest.mark.parametrize(
    ("fault", "call"),
    [(TrickleUp(5), call) for call in SENDING]
    + [(fault, call) for fault in (TrickleDown(5), BlackHole()) for call in CALLS],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_whatever_the_server_does_a_call_ends_at_its_deadline(
    fault: Fault, call: str, faulty_rclone: Faulty, tmp_path: Path
) -> None:
    store, body = faulty_rclone.store, b"x" * 2000
    (tmp_path / "file").write_bytes(body)
    faulty_rclone.direct.put("there", body)
    calls: dict[str, Callable[[], object]] = {
        "put": lambda: store.put("k", body),
        "put a file": lambda: store.put("k", tmp_path / "file"),
        "create": lambda: store.create("k", body),
        "get": lambda: store.get("there"),
        "download": lambda: store.download("there", tmp_path / "got"),
        "list": lambda: list(store.list("")),
        "head": lambda: store.head("there"),
        "delete": lambda: store.delete(["k"]),
    }
    faulty_rclone.proxy.inject(fault, times=FOREVER)
    # A byte every 200 ms: no read or write ever waits long, and without a deadline it takes minutes.
    with within(0.45), pytest.raises(Unavailable, match="not done in the time that it was given"):
        calls[call]()


def test_a_stuck_part_ends_at_its_deadline_and_the_upload_goes_on(
    faulty: Faulty, big: Path, tmp_path: Path
) -> None:
    faulty.proxy.inject(BlackHole(), when=matching("PUT", "partNumber=3"), times=FOREVER)
    with within(4.0), pytest.raises(Unavailable):
        faulty.store.put("k", big)
    sent = finished_parts(faulty.proxy)
    assert "3" not in sent
    faulty.proxy.heal()
    faulty.store.put("k", big)
    assert finished_parts(faulty.proxy) == ["1", "2", "3", "4", "5"], "each once, over both tries"
    assert is_there(faulty, "k", big, tmp_path)


def test_one_cut_costs_one_part(faulty: Faulty, big: Path, tmp_path: Path) -> None:
    faulty.proxy.inject(ResetUp(PART_BYTES - 1000), when=matching("PUT", "partNumber=3"))
    faulty.store.put("k", big)
    assert faulty.proxy.received_bytes <= big.stat().st_size + PART_BYTES + 10_000
    assert faulty.proxy.count(part_puts) == PARTS + 1
    assert is_there(faulty, "k", big, tmp_path)


def test_a_later_try_sends_only_what_is_missing(faulty: Faulty, big: Path, tmp_path: Path) -> None:
    faulty.proxy.inject(ResetUp(1 << 20), when=matching("PUT", "partNumber=4"), times=FOREVER)
    with pytest.raises(Unavailable):
        faulty.store.put("k", big)
    there = finished_parts(faulty.proxy)
    assert set(there) >= {"1", "2"}
    faulty.proxy.heal()
    faulty.proxy.requests.clear()

    faulty.store.put("k", big)

    assert sorted(there + finished_parts(faulty.proxy)) == ["1", "2", "3", "4", "5"]
    assert faulty.proxy.count(matching("POST", "uploads")) == 0, "no other upload was begun"
    assert is_there(faulty, "k", big, tmp_path)
    assert list(faulty.direct.unfinished("")) == []


def cut_in_part(number: int, faulty: Faulty, path: Path) -> None:
    """Leave an upload with some finished parts behind."""
    faulty.proxy.inject(ResetUp(1 << 20), when=matching("PUT", f"partNumber={number}"), times=FOREVER)
    with pytest.raises(Unavailable):
        faulty.store.put("k", path)
    faulty.proxy.heal()


def test_a_file_that_has_changed_begins_anew(faulty: Faulty, big: Path, tmp_path: Path) -> None:
    cut_in_part(3, faulty, big)
    big.write_bytes(os.urandom(big.stat().st_size))
    faulty.proxy.requests.clear()
    faulty.store.put("k", big)
    assert is_there(faulty, "k", big, tmp_path)
    assert faulty.proxy.count(part_puts) == PARTS
    assert list(faulty.direct.unfinished("")) == []


def test_an_upload_that_the_server_has_forgotten_begins_anew(
    faulty_radosgw: Faulty, big: Path, tmp_path: Path
) -> None:
    cut_in_part(3, faulty_radosgw, big)
    assert faulty_radosgw.direct.abort_uploads("") == 1
    faulty_radosgw.store.put("k", big)
    assert is_there(faulty_radosgw, "k", big, tmp_path)
    assert list(faulty_radosgw.direct.unfinished("")) == []


@pytest.mark.parametrize("after", ["bytes", "another file", "delete", "abort", "gone"])
def test_what_cannot_go_on_is_not_left_behind(
    after: str, faulty_radosgw: Faulty, big: Path, tmp_path: Path
) -> None:
    store = faulty_radosgw.store
    cut_in_part(3, faulty_radosgw, big)
    assert len(list(faulty_radosgw.direct.unfinished(""))) == 1
    (tmp_path / "small").write_bytes(b"small")
    match after:
        case "bytes":
            store.put("k", b"x")
        case "another file":
            store.put("k", tmp_path / "small")
        case "delete":
            store.delete(["k"])
        case "abort":
            assert store.abort_uploads("") == 1
        case "gone":
            big.unlink()
            store.put("another key", tmp_path / "small")
    assert list(faulty_radosgw.direct.unfinished("")) == []


def test_expired_credentials_are_read_anew_and_the_same_upload_goes_on(
    faulty: Faulty, big: Path, tmp_path: Path
) -> None:
    faulty.proxy.inject(Status(403, "ExpiredToken"), when=matching("PUT", "partNumber=2"))
    faulty.store.put("k", big)
    assert is_there(faulty, "k", big, tmp_path)
    assert faulty.proxy.count(matching("POST", "uploads")) == 1
    assert faulty.proxy.count(part_puts) == PARTS + 1


def test_credentials_that_stay_expired_are_read_anew_once(faulty_rclone: Faulty, big: Path) -> None:
    second_part = matching("PUT", "partNumber=2")
    faulty_rclone.proxy.inject(Status(403, "ExpiredToken"), when=second_part, times=FOREVER)
    with pytest.raises(AccessDenied, match="ExpiredToken"):
        faulty_rclone.store.put("k", big)
    assert faulty_rclone.proxy.count(second_part) == 2


def test_a_refusal_is_not_repeated(faulty: Faulty) -> None:
    faulty.proxy.inject(Status(403, "AccessDenied"), times=FOREVER)
    with pytest.raises(AccessDenied):
        faulty.store.put("k", b"x")
    assert len(faulty.proxy.requests) == 1


def test_create_only_that_is_lost_on_the_way_is_refused_and_never_an_overwrite(
    faulty_radosgw: Faulty,
) -> None:
    """The header is signed: nobody on the way can drop it unnoticed. A server that does, the probe finds."""
    faulty_radosgw.direct.put("k", b"first")
    faulty_radosgw.proxy.inject(StripHeader("If-None-Match"), times=FOREVER)
    with pytest.raises(AccessDenied, match="SignatureDoesNotMatch"):
        faulty_radosgw.store.create("k", b"second")
    assert faulty_radosgw.direct.get("k") == b"first"
    with pytest.raises(AccessDenied, match="SignatureDoesNotMatch"):
        race_probe(faulty_radosgw.store)


@pytest.mark.parametrize("kind", ["rclone", "radosgw"])
def test_what_a_killed_server_had_acknowledged_is_intact(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Small objects and files of several parts, from four threads, until some time after the kill."""
    server: S3Server = request.getfixturevalue(kind)
    store = open_store(server.url_of(f"killed-{next(_corners)}"))
    bodies = [os.urandom(200_000), os.urandom(2 * PART_BYTES + 5)]
    paths = [tmp_path / "small", tmp_path / "large"]
    for path, body in zip(paths, bodies, strict=True):
        path.write_bytes(body)
    acknowledged: list[tuple[str, int]] = []
    tried: list[tuple[str, int]] = []
    enough, killed = threading.Event(), threading.Event()

    def write(writer: int) -> None:
        for n in itertools.count():
            which = 1 if n % 8 == 7 else 0
            key = f"{writer}/{n}"
            tried.append((key, which))
            try:
                with within(20.0):
                    store.put(key, paths[which])
            except StorageError:
                if killed.is_set():
                    return
                raise
            acknowledged.append((key, which))
            if len(acknowledged) >= 60:
                enough.set()

    writers = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for writer in writers:
        writer.start()
    assert enough.wait(120)
    killed.set()
    server.kill()
    for writer in writers:
        writer.join(120)
        assert not writer.is_alive()
    server.restart()

    for key, which in acknowledged:
        store.download(key, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == bodies[which], f"{key} was acknowledged"
    for key, which in set(tried) - set(acknowledged):
        if store.head(key) is not None:
            store.download(key, tmp_path / "copy")
            assert (tmp_path / "copy").read_bytes() == bodies[which], f"{key} is there, so it is whole"
    store.put("after", paths[1])
    assert store.head("after") is not None
