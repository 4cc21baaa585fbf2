"""Failures of the tools people use today, each replayed: impossible here.

Kelpie takes a file for finished when its size has not changed for some seconds, forgets uploads that failed,
and deletes in the bucket what is deleted on the node. diffusers and accelerate delete the old checkpoint
before they write the new one. Others resume from the newest directory, whatever is in it, or from the one
with the latest time, whatever the clock was.
"""

import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
from proof.dying import KILLED, fetch_and_exit
from support.flaky_store import Died, Fault, FlakyStore
from support.invariants import violations
from support.runs import RUN, claimed, contents, ended, incarnation, read_files, ref, write_checkpoint

from storage import layout
from storage.checkpoints import CheckpointStore
from storage.directory import DirectoryStore
from storage.errors import AccessDenied, NotFound, Unavailable
from storage.local import (
    LocalCheckpoint,
    complete_checkpoints,
    remove_stale,
    staged_checkpoint,
    step_dir,
)
from storage.log import run_log
from storage.memory import MemoryStore
from storage.object_store import ObjectStore
from storage.replicator import Replicator
from storage.retention import plan_prune
from storage.run_state import RunState

PATIENCE_S = 60.0
MANY_LOOKS = 30
"""With no change to a file in between, any rule that goes by sizes or times takes it for finished."""


class Counting(Replicator):
    """Counts how often it has looked for something to publish."""

    looks = 0

    @property
    def pending(self) -> LocalCheckpoint | None:
        self.looks += 1
        return super().pending


class Node:
    """A trainer's disk and the replicator that publishes it, as attempt 1."""

    def __init__(self, store: ObjectStore, disk: Path) -> None:
        self.store = store
        self.disk = disk
        self.errors: list[Exception] = []
        checkpoints = CheckpointStore(store, RUN, run_log(store, RUN, sleep=lambda seconds: None))
        self.replicator = Counting(
            disk,
            lambda local: checkpoints.publish(local, 1, incarnation(1)),
            on_fenced=self.errors.append,
            on_error=self.errors.append,
            keep_local=1,
            rescan_s=0.001,
        )

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, "waited in vain"
            threading.Event().wait(0.01)

    def look_around(self) -> None:
        """Let the replicator look many times."""
        seen = self.replicator.looks
        self.wait_until(lambda: self.replicator.looks > seen + MANY_LOOKS)


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    store = DirectoryStore(tmp_path / "store")
    run_log(store, RUN).append(claimed(1))
    return store


@pytest.fixture
def node(store: ObjectStore, tmp_path: Path) -> Iterator[Node]:
    node = Node(store, tmp_path / "node")
    node.replicator.start()
    yield node
    node.replicator.stop()


def state_of(store: ObjectStore) -> RunState:
    return run_log(store, RUN).refresh()


def fetched(store: ObjectStore, step: int, where: Path) -> dict[str, bytes]:
    checkpoints = CheckpointStore(store, RUN, run_log(store, RUN))
    return read_files(checkpoints.fetch_step(state_of(store), step, where)[1])


def test_a_slow_writers_torn_file_is_not_uploaded_however_long_it_pauses(node: Node, tmp_path: Path) -> None:
    """Kelpie uploads whatever has not grown for five seconds."""
    half_way, go_on = threading.Event(), threading.Event()

    def write_slowly() -> None:
        with staged_checkpoint(node.disk, 10, metrics={}, final=False) as directory:
            for name, body in contents(10).items():
                path = directory / name
                path.parent.mkdir(exist_ok=True)
                with path.open("wb") as file:
                    file.write(body[:20])
                    file.flush()
                    os.utime(path, (1.0, 1.0))  # as if this were decades ago
                    half_way.set()
                    assert go_on.wait(PATIENCE_S)
                    file.write(body[20:])

    writer = threading.Thread(target=write_slowly)
    writer.start()
    assert half_way.wait(PATIENCE_S)
    node.look_around()
    before = list(node.store.list(layout.data_prefix(RUN)))
    go_on.set()
    writer.join()

    assert before == []
    node.wait_until(lambda: state_of(node.store).committed_step == 10)
    assert fetched(node.store, 10, tmp_path / "fetched") == contents(10)
    assert node.errors == []


def test_a_directory_that_somebody_fills_in_place_is_not_uploaded_before_it_is_complete(node: Node) -> None:
    """Its name alone says nothing."""
    directory = node.disk / step_dir(10)
    directory.mkdir()
    (directory / "adapter.safetensors").write_bytes(b"not all of it")

    node.look_around()

    assert list(node.store.list(layout.data_prefix(RUN))) == []
    assert state_of(node.store).checkpoints == ()


def test_the_old_checkpoint_is_there_until_the_new_one_is(node: Node) -> None:
    """diffusers and accelerate delete first, and die in between."""
    write_checkpoint(node.disk, 10)
    node.wait_until(lambda: state_of(node.store).committed_step == 10)

    with staged_checkpoint(node.disk, 20, metrics={}, final=False) as directory:
        (directory / "adapter.safetensors").write_bytes(b"half of the files")
        node.look_around()
        assert [c.step for c in complete_checkpoints(node.disk)] == [10]

    node.wait_until(lambda: state_of(node.store).committed_step == 20)
    node.wait_until(lambda: [c.step for c in complete_checkpoints(node.disk)] == [20])
    assert [c.step for c in state_of(node.store).checkpoints] == [10, 20]


@pytest.mark.parametrize("fault", [Fault.DIE_BEFORE, Fault.DIE_AFTER, Fault.DIE_HALF_WAY])
def test_with_one_to_keep_there_is_one_to_resume_from_at_every_moment(tmp_path: Path, fault: Fault) -> None:
    """The same in the store: commit the new one, retire the old one, delete it, and die at any call."""
    for at in count(1):
        store = MemoryStore()
        run_log(store, RUN).append(claimed(1))
        old = write_checkpoint(tmp_path / f"{at}", 10)
        CheckpointStore(store, RUN, run_log(store, RUN)).publish(old, 1, incarnation(1))
        flaky = FlakyStore(store, at, fault)
        ledger = run_log(flaky, RUN)
        checkpoints = CheckpointStore(flaky, RUN, ledger)
        try:
            checkpoints.publish(write_checkpoint(tmp_path / f"{at}", 20), 1, incarnation(1))
            checkpoints.retire(plan_prune(ledger.state.checkpoints, keep_last=1))
            checkpoints.reap(ledger.state)
        except Died:
            assert violations(store, RUN) == []
            step = state_of(store).committed_step
            assert fetched(store, step, tmp_path / f"{at}-{fault.name}") == contents(step)
        else:
            assert at > 6, "there are calls to die at"
            return


def test_what_is_deleted_on_the_node_stays_in_the_store(node: Node, tmp_path: Path) -> None:
    """Kelpie mirrors deletes: a full disk that is cleaned up takes the backups with it."""
    write_checkpoint(node.disk, 10)
    node.wait_until(lambda: state_of(node.store).committed_step == 10)
    shutil.rmtree(node.disk / step_dir(10))
    node.look_around()
    write_checkpoint(node.disk, 20)
    node.wait_until(lambda: state_of(node.store).committed_step == 20)
    shutil.rmtree(node.disk)
    node.look_around()

    assert [c.step for c in state_of(node.store).checkpoints] == [10, 20]
    assert fetched(node.store, 10, tmp_path / "fetched") == contents(10)


class Closed:
    """A store that takes no data until it is opened."""

    def __init__(self, inner: ObjectStore, error: Exception) -> None:
        self._inner = inner
        self._error = error
        self.open = False

    def put(self, key: str, body: bytes | Path) -> None:
        if not self.open:
            raise self._error
        self._inner.put(key, body)

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)


@pytest.mark.parametrize("error", [Unavailable("away"), AccessDenied("the key has expired")])
def test_an_upload_that_failed_is_told_and_tried_until_it_succeeds(
    store: ObjectStore, tmp_path: Path, error: Exception
) -> None:
    """Kelpie logs it and forgets the file."""
    closed = Closed(store, error)
    node = Node(closed, tmp_path / "node")  # type: ignore[arg-type]
    write_checkpoint(node.disk, 10)
    node.replicator.start()
    try:
        node.wait_until(lambda: len(node.errors) >= 2)
        assert not node.replicator.drain(0), "nobody is told that all is well"
        assert state_of(store).checkpoints == ()

        closed.open = True
        assert node.replicator.drain(PATIENCE_S)
    finally:
        node.replicator.stop()
    assert fetched(store, 10, tmp_path / "fetched") == contents(10)


def test_a_half_downloaded_newest_checkpoint_is_not_resumed_from(
    store: DirectoryStore, tmp_path: Path
) -> None:
    """Others take the newest directory there is. The process here is really killed."""
    checkpoints = CheckpointStore(store, RUN, run_log(store, RUN))
    for step in (10, 20):
        checkpoints.publish(write_checkpoint(tmp_path / "node", step), 1, incarnation(1))
    disk = tmp_path / "resumed"
    process = multiprocessing.get_context("spawn").Process(target=fetch_and_exit, args=(store.url, disk))
    process.start()
    process.join()
    assert process.exitcode == KILLED
    assert list(disk.rglob("*.safetensors")), "it had begun"

    assert complete_checkpoints(disk) == []
    checkpoint, path = checkpoints.fetch_newest(state_of(store), disk)
    assert checkpoint is not None
    assert checkpoint.step == 20
    assert path is not None
    assert read_files(path) == contents(20)
    remove_stale(disk)
    assert [entry.name for entry in disk.iterdir()] == [step_dir(20)]


def test_the_newest_checkpoint_is_the_last_one_whatever_the_clocks_say(tmp_path: Path) -> None:
    """Levanter goes by time stamps, and strangers' clocks are wrong."""
    store = MemoryStore()
    log = run_log(store, RUN)
    for attempt, clock in ((1, 2_000_000_000.0), (2, 1_000.0)):
        log.append(claimed(attempt))
        checkpoints = CheckpointStore(store, RUN, log, clock=lambda clock=clock: clock)  # type: ignore[misc]
        local = write_checkpoint(tmp_path / f"{attempt}", 10 * attempt)
        checkpoints.publish(local, attempt, incarnation(attempt))
        log.append(ended(attempt))

    newest = state_of(store).newest
    assert newest is not None
    assert newest.ref == ref(20, 2)


def test_a_checkpoint_that_is_asked_for_and_not_there_is_no_fresh_start(store: ObjectStore) -> None:
    """diffusers prints a line and trains from step 0."""
    with pytest.raises(NotFound, match="no checkpoint of step 70; there are: none"):
        CheckpointStore(store, RUN, run_log(store, RUN)).fetch_step(state_of(store), 70, Path("unused"))
