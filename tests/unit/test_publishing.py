"""What an attempt sends first when there is little time, and what it tells of its uploads."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs import RUN, claimed, ended, incarnation, write_checkpoint

from storage.checkpoints import CheckpointStore
from storage.errors import Fenced, Unavailable
from storage.local import LocalCheckpoint
from storage.log import run_log
from storage.memory import MemoryStore
from storage.records import Committed
from trainer.publishing import Publisher

KB = 1000
SIZE = 300 * KB


class Uplink(MemoryStore):
    """Sends a kilobyte a second, by its own clock."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        self.sent: list[str] = []
        self.before_put: Callable[[str], None] = lambda name: None

    def put(self, key: str, body: bytes | Path) -> None:
        name = key.rpartition("/")[2]
        self.before_put(name)
        self.seconds += (body.stat().st_size if isinstance(body, Path) else len(body)) / KB
        self.sent.append(name)
        super().put(key, body)


class World:
    """One attempt, its disk, its link and its deadline."""

    def __init__(self, disk: Path) -> None:
        self.disk = disk
        self.store = Uplink()
        self.log = run_log(self.store, RUN)
        self.log.append(claimed())
        self.left_s: float | None = None
        checkpoints = CheckpointStore(self.store, RUN, self.log, monotonic=lambda: self.store.seconds)
        self.publisher = Publisher(checkpoints, 1, incarnation(1), left_s=lambda: self.left_s)

    def saved(self, step: int, *, final: bool = False) -> LocalCheckpoint:
        # Bytes that do not shrink: what is sent is what is there.
        files = {name: noise(step, name) for name in ("adapter.safetensors", "optimizer.safetensors")}
        return write_checkpoint(self.disk, step, final=final, files=files | {"state.json": b"{}"})

    def commits(self) -> list[tuple[int, bool]]:
        self.log.refresh()
        return [
            (e.record.step, e.record.resumable) for e in self.log.entries() if isinstance(e.record, Committed)
        ]


def noise(step: int, name: str) -> bytes:
    import random

    size = SIZE // 3 if name.startswith("adapter") else 2 * SIZE // 3
    return random.Random(f"{step} {name}").randbytes(size)


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.publisher.publish(made.saved(10))  # from here on it is known that 300 kB take 300 s
    made.store.sent.clear()
    return made


@pytest.mark.parametrize("left_s", [None, 400.0])
def test_with_time_for_all_of_it_all_of_it_is_committed_at_once(world: World, left_s: float | None) -> None:
    world.left_s = left_s
    done = world.publisher.publish(world.saved(20))
    assert world.commits() == [(10, True), (20, True)]
    assert (done.step, done.state_bytes, done.sent_bytes) == (20, SIZE + 2, SIZE + 2)


def test_with_little_time_the_adapter_is_committed_first_and_then_the_whole(world: World) -> None:
    world.left_s = 120.0
    done = world.publisher.publish(world.saved(20))
    assert world.commits() == [(10, True), (20, False), (20, True)]
    assert world.store.sent == ["adapter.safetensors", "state.json", "optimizer.safetensors"]
    assert done.sent_bytes == SIZE + 2, "nothing was sent twice"


def test_the_machine_that_goes_leaves_the_adapter_and_the_checkpoint_before(world: World) -> None:
    def dies(name: str) -> None:
        if name.startswith("optimizer"):
            raise SystemExit

    world.left_s = 120.0
    world.store.before_put = dies
    with pytest.raises(SystemExit):
        world.publisher.publish(world.saved(20))

    state = run_log(world.store, RUN).refresh()
    assert [c.step for c in state.checkpoints] == [10], "the next attempt resumes from here"
    assert [(c.step, c.resumable) for c in state.stored] == [(10, True), (20, False)]


def test_before_anything_was_measured_nothing_is_salvaged(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.left_s = 1.0
    world.publisher.publish(world.saved(10))
    assert world.commits() == [(10, True)]


def test_a_final_checkpoint_is_the_result_or_nothing(world: World) -> None:
    world.left_s = 1.0
    world.publisher.publish(world.saved(20, final=True))
    assert world.commits() == [(10, True), (20, True)]


def test_a_store_that_refuses_the_salvage_does_not_keep_the_whole_from_being_tried(world: World) -> None:
    refusals = [Unavailable("no answer")]

    def refuse(name: str) -> None:
        if refusals:
            raise refusals.pop()

    world.left_s = 120.0
    world.store.before_put = refuse
    world.publisher.publish(world.saved(20))
    assert world.commits() == [(10, True), (20, True)]


def test_a_fenced_attempt_salvages_nothing(world: World) -> None:
    world.log.append(ended(1))
    world.left_s = 120.0
    with pytest.raises(Fenced):
        world.publisher.publish(world.saved(20))
    assert world.commits() == [(10, True)]


def test_a_checkpoint_that_waits_for_an_older_one_is_salvaged_beside_it(world: World) -> None:
    sending, go_on = threading.Event(), threading.Event()

    def hold(name: str) -> None:
        if name.startswith("optimizer") and not go_on.is_set():
            sending.set()
            assert go_on.wait(60)

    world.store.before_put = hold
    older, newer = world.saved(20), world.saved(30)
    sender = threading.Thread(target=world.publisher.publish, args=(older,))
    sender.start()
    try:
        assert sending.wait(60)
        assert world.publisher.is_held_up(newer)
        assert not world.publisher.is_held_up(older)
        world.left_s = 120.0
        world.publisher.salvage_beside(newer)
        assert world.commits() == [(10, True), (30, False)]
    finally:
        go_on.set()
        sender.join()
    world.publisher.publish(newer)
    assert world.commits() == [(10, True), (30, False), (20, True), (30, True)]
    assert world.log.state.salvaged == ()
    assert world.store.sent.count("adapter.safetensors") == 2, "one of each step"


def test_a_checkpoint_that_is_being_sent_by_now_is_not_salvaged_beside_it(world: World) -> None:
    """It was held up when the other thread was started: two must not send the same files."""
    sending, go_on = threading.Event(), threading.Event()

    def hold(name: str) -> None:
        if name.startswith("optimizer"):
            sending.set()
            assert go_on.wait(60)

    world.store.before_put = hold
    checkpoint = world.saved(20)
    sender = threading.Thread(target=world.publisher.publish, args=(checkpoint,))
    sender.start()
    try:
        assert sending.wait(60)
        world.left_s = 120.0
        world.publisher.salvage_beside(checkpoint)
        assert world.commits() == [(10, True)]
    finally:
        go_on.set()
        sender.join()
    world.publisher.salvage_beside(checkpoint)
    assert world.commits() == [(10, True), (20, True)]
