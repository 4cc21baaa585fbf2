"""What the transport does when network or provider misbehave: each request."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.faults import (
    FOREVER,
    BlackHole,
    CorruptUp,
    Fault,
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
from support.faulty import PARTS, Faulty, is_there, part_puts

from storage.errors import AccessDenied, Unavailable
from storage.probe import race_probe
from storage.s3.deadline import within
from storage.s3.retry import BUDGET, TRIES


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
