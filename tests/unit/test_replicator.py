"""The replicator: whatever it misses or has to wait for, the newest checkpoint reaches the store."""

import errno
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.runs import contents, read_files, write_checkpoint

from storage.errors import (
    AccessDenied,
    Corrupt,
    Fenced,
    Unavailable,
)
from storage.local import LocalCheckpoint, complete_checkpoints
from storage.replicator import Replicator

NEVER_S = 3600.0
"""A rescan interval that no test outlives."""
PATIENCE_S = 60.0
"""For whatever has to come about; nothing takes so long, on whatever machine."""


class Uplink:
    """Takes checkpoints; a test may hold it, or let it fail."""

    def __init__(self) -> None:
        self.published: list[int] = []
        self.began: list[int] = []
        self.errors: list[Exception] = []
        self.fenced: list[Fenced] = []
        self.failures: list[Exception] = []
        self.refused: set[int] = set()
        """Checkpoints of these steps fail, as long as they are in it."""
        self.open = threading.Event()
        self.open.set()
        self._changed = threading.Condition()

    def publish(self, checkpoint: LocalCheckpoint) -> None:
        self._note(self.began, checkpoint.step)
        assert self.open.wait(PATIENCE_S)
        if self.failures:
            raise self.failures.pop(0)
        if checkpoint.step in self.refused:
            raise Unavailable("no answer")
        assert read_files(checkpoint.path) == contents(checkpoint.step)
        self._note(self.published, checkpoint.step)

    def on_error(self, error: Exception) -> None:
        self._note(self.errors, error)

    def on_fenced(self, error: Fenced) -> None:
        self._note(self.fenced, error)

    def until(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, timeout=PATIENCE_S), vars(self)

    def _note(self, where: list, what: object) -> None:  # type: ignore[type-arg]
        with self._changed:
            where.append(what)
            self._changed.notify_all()


Start = Callable[..., Replicator]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried soon."""
    monkeypatch.setattr("storage.replicator.FIRST_PAUSE_S", 0.02)


@pytest.fixture
def uplink() -> Uplink:
    return Uplink()


@pytest.fixture
def start(tmp_path: Path, uplink: Uplink) -> Iterator[Start]:
    """Starts replicators of ``tmp_path`` that look only when told by an event, unless asked otherwise."""
    started: list[Replicator] = []

    def start(**options: float) -> Replicator:
        replicator = Replicator(
            tmp_path,
            uplink.publish,
            on_fenced=uplink.on_fenced,
            on_error=uplink.on_error,
            **{"rescan_s": NEVER_S, **options},  # type: ignore[arg-type]
        )
        started.append(replicator)
        replicator.start()
        return replicator

    yield start
    uplink.open.set()
    for replicator in started:
        replicator.stop()


def test_a_checkpoint_is_published_when_it_appears(tmp_path: Path, uplink: Uplink, start: Start) -> None:
    replicator = start()
    write_checkpoint(tmp_path, 10)
    uplink.until(lambda: uplink.published == [10])
    write_checkpoint(tmp_path, 20)
    uplink.until(lambda: uplink.published == [10, 20])
    assert replicator.drain(PATIENCE_S)
    assert replicator.pending is None


def test_what_was_there_before_the_start_is_published(tmp_path: Path, uplink: Uplink, start: Start) -> None:
    write_checkpoint(tmp_path, 10)
    write_checkpoint(tmp_path, 20)
    assert start().drain(PATIENCE_S)
    assert uplink.published == [20], "newest first, and the superseded one not at all"


def test_what_was_superseded_while_an_upload_ran_is_skipped(
    tmp_path: Path, uplink: Uplink, start: Start
) -> None:
    uplink.open.clear()
    replicator = start()
    write_checkpoint(tmp_path, 10)
    uplink.until(lambda: uplink.began == [10])
    for step in (20, 30, 40):
        write_checkpoint(tmp_path, step)
    assert replicator.pending is not None
    uplink.open.set()
    assert replicator.drain(PATIENCE_S)
    assert uplink.published == [10, 40]


def test_a_missed_event_is_made_up_for_by_looking_again(tmp_path: Path, uplink: Uplink, start: Start) -> None:
    replicator = start(rescan_s=0.02)
    replicator._observer.stop()
    replicator._observer.join()
    write_checkpoint(tmp_path, 10)
    uplink.until(lambda: uplink.published == [10])


def test_draining_needs_no_event_either(tmp_path: Path, uplink: Uplink, start: Start) -> None:
    replicator = start()
    replicator._observer.stop()
    replicator._observer.join()
    write_checkpoint(tmp_path, 10, final=True)
    assert replicator.drain(PATIENCE_S)
    assert uplink.published == [10]


@pytest.mark.parametrize(
    "failure", [Unavailable("no answer"), AccessDenied("403"), RuntimeError("a bug"), Corrupt("log entry 7")]
)
def test_a_store_that_fails_is_tried_again_until_it_works(
    tmp_path: Path, uplink: Uplink, start: Start, failure: Exception
) -> None:
    uplink.failures = [failure, failure]
    replicator = start()
    write_checkpoint(tmp_path, 10)
    assert replicator.drain(PATIENCE_S)
    assert uplink.published == [10]
    assert uplink.errors == [failure, failure]


def test_a_process_out_of_files_publishes_once_it_has_some(
    tmp_path: Path, uplink: Uplink, start: Start
) -> None:
    """What goes wrong while a failure is dealt with must not end the only thread that publishes."""
    write_checkpoint(tmp_path, 1)
    usual, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    uplink.open.clear()
    replicator = start()
    uplink.until(lambda: uplink.began == [1])
    os.close(lowest_free := os.dup(0))
    try:
        # No lower: with less than what it waits for, watchdog's poll() would be refused, and its thread end.
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, most))
        uplink.failures = [Unavailable("503")]
        uplink.open.set()
        uplink.until(lambda: len(uplink.errors) >= 2)
        assert not replicator.drain(0.0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (usual, most))

    assert replicator.drain(PATIENCE_S)
    assert uplink.published == [1]


def test_a_watcher_or_a_listener_that_fails_ends_nothing(
    tmp_path: Path, uplink: Uplink, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise KeyError("an error that nobody thought of")

    monkeypatch.setattr("storage.replicator.Observer", fails)
    monkeypatch.setattr(uplink, "on_error", fails)
    uplink.failures = [Unavailable("503")]
    write_checkpoint(tmp_path, 1)

    assert start().drain(PATIENCE_S)
    assert uplink.published == [1]


def test_a_newer_checkpoint_takes_the_place_of_one_that_could_not_be_published(
    tmp_path: Path, uplink: Uplink, start: Start
) -> None:
    uplink.refused = {10}
    replicator = start()
    write_checkpoint(tmp_path, 10)
    uplink.until(lambda: len(uplink.errors) >= 1)
    write_checkpoint(tmp_path, 20)
    assert replicator.drain(PATIENCE_S)
    assert uplink.published == [20]


def test_being_fenced_ends_replication_for_good(tmp_path: Path, uplink: Uplink, start: Start) -> None:
    uplink.failures = [Fenced("attempt 2 is the newest")]
    replicator = start()
    write_checkpoint(tmp_path, 10)
    uplink.until(lambda: len(uplink.fenced) == 1)
    write_checkpoint(tmp_path, 20)

    began = time.monotonic()
    assert not replicator.drain(PATIENCE_S)
    assert time.monotonic() - began < PATIENCE_S, "there is nothing to wait for"
    assert (uplink.published, uplink.began, len(uplink.fenced)) == ([], [10], 1)


def test_draining_ends_at_its_deadline(tmp_path: Path, uplink: Uplink, start: Start) -> None:
    uplink.open.clear()
    replicator = start()
    write_checkpoint(tmp_path, 10)
    uplink.until(lambda: uplink.began == [10])
    assert not replicator.drain(0.05)
    uplink.open.set()
    assert replicator.drain(PATIENCE_S)


def test_draining_what_was_never_started_waits_for_nothing(tmp_path: Path, uplink: Uplink) -> None:
    replicator = Replicator(tmp_path, uplink.publish, on_fenced=uplink.on_fenced)
    assert replicator.drain(PATIENCE_S)
    write_checkpoint(tmp_path, 10)
    began = time.monotonic()
    assert not replicator.drain(PATIENCE_S)
    assert time.monotonic() - began < PATIENCE_S
    replicator.stop()


def test_a_damaged_newest_is_reported_and_the_one_before_published(
    tmp_path: Path, uplink: Uplink, start: Start
) -> None:
    write_checkpoint(tmp_path, 10)
    newest = write_checkpoint(tmp_path, 20)
    (newest.path / "adapter.safetensors").write_bytes(b"torn")
    damage = Corrupt("adapter.safetensors: 4 bytes")
    uplink.failures = [damage]
    replicator = start()
    uplink.until(lambda: uplink.published == [10])
    assert uplink.errors == [damage]
    assert not replicator.drain(PATIENCE_S), "the newest is not published, and drain must not claim it"


def test_the_disk_keeps_the_newest_few(tmp_path: Path, uplink: Uplink, start: Start) -> None:
    replicator = start(keep_local=2, rescan_s=0.02)
    for step in (10, 20, 30, 40):
        write_checkpoint(tmp_path, step)
        assert replicator.drain(PATIENCE_S)
    until(lambda: [c.step for c in complete_checkpoints(tmp_path)] == [40, 30])


def test_a_store_that_is_away_does_not_fill_the_disk_nor_lose_the_newest(
    tmp_path: Path, uplink: Uplink, start: Start
) -> None:
    uplink.refused = {10, 20, 30}
    replicator = start(keep_local=1, spool_limit_bytes=0)
    for step in (10, 20, 30):
        write_checkpoint(tmp_path, step)
        uplink.until(lambda step=step: step in uplink.began)  # type: ignore[misc]
    until(lambda: [c.step for c in complete_checkpoints(tmp_path)] == [30])
    uplink.refused.clear()
    assert replicator.drain(PATIENCE_S)
    assert uplink.published == [30]


def test_a_newest_checkpoint_that_cannot_be_read_now_is_waited_for(
    tmp_path: Path, uplink: Uplink, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither is it taken for published, nor is the one before it published in its place."""
    write_checkpoint(tmp_path, 10)
    newest = write_checkpoint(tmp_path, 20).path
    readable, broken = Path.read_bytes, threading.Event()

    def read(path: Path) -> bytes:
        if path.parent == newest and broken.is_set():
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return readable(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    broken.set()
    replicator = start()
    uplink.until(lambda: len(uplink.errors) > 0)
    assert not replicator.drain(0.0)

    broken.clear()
    assert replicator.drain(PATIENCE_S)
    assert uplink.published == [20]


def test_an_unfinished_checkpoint_is_left_alone(tmp_path: Path, uplink: Uplink, start: Start) -> None:
    half = tmp_path / ".tmp-0123456789abcdef"
    half.mkdir()
    (half / "adapter.safetensors").write_bytes(b"half")
    replicator = start(rescan_s=0.02)
    write_checkpoint(tmp_path, 10)
    assert replicator.drain(PATIENCE_S)
    assert (uplink.published, half.exists()) == ([10], True)


def test_at_least_one_checkpoint_must_stay_on_the_disk(tmp_path: Path, uplink: Uplink) -> None:
    with pytest.raises(ValueError, match="keep_local must be at least 1, got 0"):
        Replicator(tmp_path, uplink.publish, on_fenced=uplink.on_fenced, keep_local=0)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)
