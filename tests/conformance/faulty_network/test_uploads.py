"""What the transport does when network or provider misbehave: uploads of several parts, which go on."""

import itertools
import os
import threading
from pathlib import Path

import pytest
from support.fault_proxy import FaultProxy
from support.faults import FOREVER, BlackHole, ResetUp, Status, matching
from support.faulty import PARTS, Faulty, is_there, part_puts
from support.s3_servers import S3Server

from storage.errors import AccessDenied, StorageError, Unavailable
from storage.s3.deadline import within
from storage.s3.uplink import PART_BYTES
from storage.url import open_store


def finished_parts(proxy: FaultProxy) -> list[str]:
    """The parts that the server took, as their requests name them."""
    return sorted(
        seen.path.split("partNumber=")[1].split("&")[0]
        for seen in proxy.requests
        if part_puts(seen) and seen.answered == 200
    )


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


@pytest.mark.parametrize("kind", ["rclone", "radosgw"])
def test_what_a_killed_server_had_acknowledged_is_intact(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Small objects and files of several parts, from four threads, until some time after the kill."""
    server: S3Server = request.getfixturevalue(kind)
    store = open_store(server.url_of("killed"))
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
