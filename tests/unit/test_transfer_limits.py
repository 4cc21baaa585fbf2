"""How long a request may take, how often it is repeated, and how a file is cut into parts."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import pytest

from storage.background import each
from storage.errors import Unavailable
from storage.s3.deadline import (
    IDLE_S,
    DeadlineExceeded,
    LimitedSocket,
    answer_s,
    answered_within,
    current,
    left_s,
    patience_s,
    until,
    within,
)
from storage.s3.file_slice import FileSlice
from storage.s3.multipart import Uploads
from storage.s3.retry import (
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    RetryBudget,
    pause_s,
)
from storage.s3.store import S3Store
from storage.s3.uplink import (
    COMPLETE_S,
    MOST_PARTS,
    PART_BYTES,
    PARTS_AT_ONCE,
    SINGLE_PUT_BYTES,
    SLOWEST_SERVER_BYTES_PER_S,
    Uplink,
    allowance_s,
    part_bytes,
    parts_at_once,
    sent_whole,
)

MBIT = 1e6 / 8

T = TypeVar("T")


def test_the_nearest_limit_holds_and_goes_with_its_block() -> None:
    assert (current(), left_s()) == (None, float("inf"))
    with within(1000):
        outer = current()
        with within(2000):
            assert current() == outer, "an inner limit never extends an outer one"
        with within(10):
            assert left_s() <= 10
        assert current() == outer
    assert current() is None


def test_a_limit_reaches_another_thread_only_when_it_is_handed_over() -> None:
    seen: list[float | None] = []

    def look(deadline: float | None) -> None:
        seen.append(current())
        with until(deadline):
            seen.append(current())

    with within(1000):
        thread = threading.Thread(target=look, args=(current(),))
        thread.start()
        thread.join()
        assert seen == [None, current()]


def test_no_time_left_is_said_so() -> None:
    with within(0), pytest.raises(DeadlineExceeded, match="not done in the time that it was given"):
        patience_s()


def test_only_an_answer_may_be_waited_for_for_longer() -> None:
    ours, theirs = socket.socketpair()
    limited = LimitedSocket.taking_over(ours)
    with limited, theirs, within(1000):
        theirs.sendall(b"answer")
        with answered_within(90.0):
            limited.sendall(b"x")
            assert limited.gettimeout() == IDLE_S
            limited.recv(1)
            assert limited.gettimeout() == 90.0
        limited.recv(1)
        assert limited.gettimeout() == IDLE_S


class Waiting:
    """Takes any request, and notes how long each would have waited for its answer."""

    def __init__(self) -> None:
        self.waited_s: dict[str, float] = {}

    def __getattr__(self, operation: str) -> Callable[..., dict[str, str]]:
        def called(**options: object) -> dict[str, str]:
            self.waited_s[operation] = answer_s()
            return {"UploadId": "u", "ETag": "some name"}

        return called


@pytest.mark.parametrize("size_bytes", [1000, PART_BYTES, 4 * PART_BYTES])
def test_a_server_has_time_for_the_bytes_that_it_got(size_bytes: int, tmp_path: Path) -> None:
    client = Waiting()

    def request(key: str, send: Callable[[Any], T], *, allow_s: float | None = None) -> T:
        return send(client)

    (tmp_path / "file").write_bytes(b"x" * size_bytes)
    Uploads("bucket", request, 60.0).put("k", "k", tmp_path / "file")

    if size_bytes > PART_BYTES:
        assert client.waited_s["create_multipart_upload"] == IDLE_S
        assert client.waited_s["upload_part"] > IDLE_S
        assert 60 < client.waited_s["complete_multipart_upload"] < COMPLETE_S
    else:
        assert client.waited_s["put_object"] == IDLE_S + size_bytes / SLOWEST_SERVER_BYTES_PER_S


@pytest.fixture
def silent() -> Iterator[int]:
    """A port where connections are taken and nothing is ever said."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_server_that_takes_the_connection_and_says_nothing_is_left_in_time(
    scheme: str, silent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over TLS it is the handshake that never ends."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "TESTACCESSKEY001")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testsecretkey0001")
    store = S3Store("loras", endpoint=f"{scheme}://127.0.0.1:{silent}", region="us-east-1", request_s=0.5)
    with pytest.raises(Unavailable, match="not done in the time that it was given"):
        store.put("k", b"x")


def test_a_tls_handshake_that_trickles_is_left_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "TESTACCESSKEY001")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testsecretkey0001")
    given_up = threading.Event()

    def trickle(server: socket.socket) -> None:
        client, _ = server.accept()
        with closing(client):
            # The beginning of a handshake record of 16 KB, of which the rest never comes to an end.
            for byte in b"\x16\x03\x03\x40\x00" + bytes(1000):
                try:
                    client.send(bytes([byte]))
                except OSError:
                    break
                if given_up.wait(0.05):
                    break

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=trickle, args=(server,))
        thread.start()
        port = server.getsockname()[1]
        store = S3Store("loras", endpoint=f"https://127.0.0.1:{port}", region="us-east-1", request_s=0.5)
        with pytest.raises(Unavailable):
            store.put("k", b"x")
        given_up.set()
        thread.join()


def test_pauses_grow_up_to_a_bound_and_are_random_from_zero() -> None:
    def longest(failures: int) -> float:
        return pause_s(failures, draw=lambda least, most: most)

    assert [longest(n) for n in (1, 2, 3)] == [FIRST_PAUSE_S * 2, FIRST_PAUSE_S * 4, FIRST_PAUSE_S * 8]
    assert longest(50) == LONGEST_PAUSE_S
    assert pause_s(50, draw=lambda least, most: least) == 0
    assert pause_s(1, 7.0, draw=lambda least, most: least) == 7.0


def test_a_budget_is_used_up_by_repetitions_and_refilled_by_answers_only() -> None:
    budget = RetryBudget(2)
    assert [budget.spend() for _ in range(3)] == [True, True, False]
    budget.refill()
    assert [budget.spend() for _ in range(2)] == [True, False]
    for _ in range(10):
        budget.refill()
    assert [budget.spend() for _ in range(3)] == [True, True, False], "it never holds more than it began with"


@pytest.mark.parametrize(
    ("size", "rate", "whole"),
    [
        (PART_BYTES, None, True),
        (PART_BYTES + 1, None, False),
        (20 << 20, 100 * MBIT, True),
        (30 << 20, 100 * MBIT, False),
        (PART_BYTES, 1 * MBIT, True),
        (SINGLE_PUT_BYTES, 1e12, True),
        (SINGLE_PUT_BYTES + 1, 1e12, False),
    ],
)
def test_a_file_goes_whole_where_a_cut_would_cost_little(size: int, rate: float | None, whole: bool) -> None:
    assert sent_whole(size, rate) is whole


@pytest.mark.parametrize(
    ("rate", "count"), [(None, 1), (5 * MBIT, 1), (100 * MBIT, 2), (1000 * MBIT, PARTS_AT_ONCE)]
)
def test_a_slow_uplink_carries_one_part_at_a_time(rate: float | None, count: int) -> None:
    assert parts_at_once(rate) == count


@pytest.mark.parametrize("size", [1, PART_BYTES, 10_000 * PART_BYTES, 10_000 * PART_BYTES + 1, 5 << 40])
def test_a_file_of_any_size_has_a_number_of_parts_that_servers_take(size: int) -> None:
    assert -(-size // part_bytes(size)) <= MOST_PARTS


def test_a_transfer_may_take_longer_the_larger_it_is_and_the_less_is_known_of_the_uplink() -> None:
    assert allowance_s(0, None) == 0
    assert allowance_s(PART_BYTES, None) == allowance_s(PART_BYTES, 1.0) > allowance_s(PART_BYTES, 1e9)
    # Four of them at 1 Mbit/s need 270 s.
    assert allowance_s(4 * PART_BYTES, 1 * MBIT) > 4 * PART_BYTES / MBIT


def test_the_uplink_follows_what_it_carried_and_forgets_it_when_stuck() -> None:
    uplink = Uplink()
    uplink.carried(1000, 1.0)
    assert uplink.bytes_per_s is None, "a small request tells nothing"
    uplink.carried(PART_BYTES, 2.0, at_once=2)
    assert uplink.bytes_per_s == PART_BYTES
    uplink.carried(PART_BYTES, 0.5)
    assert PART_BYTES < (uplink.bytes_per_s or 0) < 2 * PART_BYTES
    uplink.stuck()
    assert uplink.bytes_per_s is None


def test_a_slice_reads_its_part_of_the_file_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(100)))
    with (tmp_path / "file").open("rb") as file:
        part = FileSlice(file.fileno(), 10, 20, hashing=True)
        assert (len(part), part.read(5), part.tell(), part.read(), part.read(5)) == (
            20,
            bytes(range(10, 15)),
            5,
            bytes(range(15, 30)),
            b"",
        )
        assert part.sent_md5 == FileSlice(file.fileno(), 10, 20).md5()
        part.seek(0)
        assert part.read() == bytes(range(10, 30)), "it can be sent again"
        assert part.sent_md5 == FileSlice(file.fileno(), 10, 20).md5()
        os.truncate(tmp_path / "file", 15)
        part.seek(0)
        assert part.read() == bytes(range(10, 15))
        with pytest.raises(OSError, match="became shorter"):
            part.read()


STUCK_UPLOAD = """
import sys, threading
from pathlib import Path
from storage.s3.multipart import Uploads

sending = threading.Event()

def request(key, send, *, allow_s=None):
    if send.__name__ == "<lambda>":
        return {"UploadId": "u"}
    sending.set()
    threading.Event().wait()

uploads = Uploads("bucket", request, 60.0)
threading.Thread(target=uploads.put, args=("k", "k", Path(sys.argv[1])), daemon=True).start()
assert sending.wait(60)
"""


def test_a_process_ends_though_a_part_is_stuck(tmp_path: Path) -> None:
    """As in the replicator's thread, while the store takes the bytes and says nothing."""
    file = tmp_path / "file"
    with file.open("wb") as large:
        large.truncate(4 * PART_BYTES)
    root = Path(__file__).parents[2]

    subprocess.run([sys.executable, "-c", STUCK_UPLOAD, str(file)], check=True, timeout=120, cwd=root)


def test_each_item_has_its_result_and_the_first_failure_is_raised() -> None:
    assert each("test", lambda n: n * n, range(20), at_once=3) == [n * n for n in range(20)]
    assert each("test", str, [], at_once=3) == []
    with pytest.raises(ZeroDivisionError):
        each("test", lambda n: 1 / n, range(20), at_once=3)
