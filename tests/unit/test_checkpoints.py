"""Publishing, fetching and deleting: a checkpoint exists exactly when its record says so."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.flaky_store import Fault, FlakyStore
from support.runs import (
    RUN,
    claimed,
    contents,
    ended,
    finished,
    incarnation,
    read_files,
    ref,
    write_checkpoint,
)

from storage import layout
from storage.checkpoints import CheckpointStore
from storage.errors import Corrupt, Fenced, InvalidName, NotFound, Unavailable
from storage.local import complete_checkpoints
from storage.log import RunLog, run_log
from storage.memory import MemoryStore
from storage.object_store import ObjectStore
from storage.records import Committed, Quarantined, StoredFile


@dataclass
class World:
    """A run in a store, one checkpoint store over it, and a node's disk."""

    store: MemoryStore
    log: RunLog
    checkpoints: CheckpointStore
    disk: Path
    seconds: float = 0.0

    def publish(self, step: int, attempt: int = 1, *, final: bool = False) -> Committed:
        local = write_checkpoint(self.disk / "out", step, final=final)
        return self.checkpoints.publish(local, attempt, incarnation(attempt))

    def data(self) -> list[str]:
        return [info.key for info in self.store.list(layout.data_prefix(RUN))]

    def key(self, checkpoint: Committed, file: str = "adapter.safetensors") -> str:
        return layout.committed_file(RUN, checkpoint, file)


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A run whose first attempt is running."""
    store = MemoryStore()
    log = run_log(store, RUN)
    log.append(claimed())
    made = World(store, log, CheckpointStore(store, RUN, log, clock=lambda: 7.0), tmp_path)
    made.checkpoints = CheckpointStore(store, RUN, log, clock=lambda: 7.0, monotonic=lambda: made.seconds)
    return made


def flip_a_byte(store: MemoryStore, key: str) -> None:
    body = bytearray(store.get(key))
    body[len(body) // 2] ^= 1
    store.put(key, bytes(body))


def test_a_published_checkpoint_is_fetched_bit_by_bit(world: World) -> None:
    committed = world.publish(10)

    assert world.log.state.newest == committed
    assert (committed.step, committed.attempt, committed.metrics) == (10, 1, {"loss": 1 / 11})
    target = world.checkpoints.fetch(committed, world.disk / "in" / "step-000000010")
    assert read_files(target) == contents(10)
    assert [c.path for c in complete_checkpoints(world.disk / "in")] == [target]


def test_publishing_twice_commits_once(world: World) -> None:
    first = world.publish(10)
    again = world.publish(10)
    assert again == first
    assert world.log.next_seq == 2


def test_nothing_is_committed_when_a_file_is_not_what_the_manifest_says(world: World) -> None:
    local = write_checkpoint(world.disk / "out", 10)
    (local.path / "state" / "optimizer.safetensors").write_bytes(b"torn")
    with pytest.raises(Corrupt, match=r"state/optimizer\.safetensors: 4 bytes, its record says"):
        world.checkpoints.publish(local, 1, incarnation(1))
    assert world.log.refresh().newest is None


def test_a_file_that_changes_while_it_is_uploaded_is_not_committed(tmp_path: Path) -> None:
    local = write_checkpoint(tmp_path, 10)

    class Racing(MemoryStore):
        def put(self, key: str, body: bytes | Path) -> None:
            super().put(key, body)
            if isinstance(body, Path):
                with body.open("ab") as file:
                    file.write(b"more")

    store = Racing()
    log = run_log(store, RUN)
    log.append(claimed())
    with pytest.raises(Corrupt, match="changed while it was uploaded"):
        CheckpointStore(store, RUN, log).publish(local, 1, incarnation(1))
    assert log.refresh().newest is None


def test_a_ghost_uploads_under_its_own_prefix_and_is_refused(world: World) -> None:
    ghosts_view = run_log(world.store, RUN)
    ghosts_view.refresh()
    ghost = CheckpointStore(world.store, RUN, ghosts_view)
    world.log.append(ended(1))
    world.log.append(claimed(2))
    mine = world.publish(10, attempt=2)

    local = write_checkpoint(world.disk / "ghost", 10, files={"adapter.safetensors": b"stale"})
    with pytest.raises(Fenced, match="attempt 1 is fenced"):
        ghost.publish(local, 1, incarnation(1))

    assert world.log.refresh().checkpoints == (mine,)
    fetched = world.checkpoints.fetch(mine, world.disk / "in" / "step-000000010")
    assert read_files(fetched) == contents(10)


def test_a_fetch_that_fails_leaves_nothing_behind(world: World) -> None:
    committed = world.publish(10)
    flip_a_byte(world.store, world.key(committed))
    target = world.disk / "in" / "step-000000010"
    with pytest.raises(Corrupt, match=rf"{world.key(committed)} in memory://: sha256 is .* its record says"):
        world.checkpoints.fetch(committed, target)
    world.store.delete([world.key(committed)])
    with pytest.raises(NotFound, match=r"adapter\.safetensors"):
        world.checkpoints.fetch(committed, target)
    assert list((world.disk / "in").iterdir()) == []


def test_a_file_that_arrives_damaged_once_is_fetched_again(world: World) -> None:
    committed = world.publish(10)
    damaged: list[str] = []

    class NoisyLine(FlakyStore):
        def download(self, key: str, target: Path) -> None:
            super().download(key, target)
            if key not in damaged:
                damaged.append(key)
                target.write_bytes(b"noise")

    noisy = CheckpointStore(NoisyLine(world.store, 0, Fault.REFUSE), RUN, world.log)
    fetched = noisy.fetch(committed, world.disk / "in" / "step-000000010")
    assert read_files(fetched) == contents(10)
    assert len(damaged) == 2


def test_a_directory_that_already_is_the_checkpoint_is_used_and_any_other_is_replaced(world: World) -> None:
    committed = world.publish(10)
    target = world.disk / "in" / "step-000000010"
    world.checkpoints.fetch(committed, target)
    nothing_to_read = CheckpointStore(FlakyStore(world.store, 1, Fault.REFUSE), RUN, world.log)
    assert nothing_to_read.fetch(committed, target) == target

    (target / "adapter.safetensors").write_bytes(b"X" + contents(10)["adapter.safetensors"][1:])
    world.checkpoints.fetch(committed, target)
    assert read_files(target) == contents(10)


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "a\\b", "nul\0"])
def test_a_record_with_an_escaping_file_name_is_not_fetched(world: World, name: str) -> None:
    committed = world.publish(10)
    evil = committed.model_copy(update={"files": (StoredFile(name=name, size_bytes=0, sha256="0" * 64),)})
    with pytest.raises(InvalidName):
        world.checkpoints.fetch(evil, world.disk / "in" / "step-000000010")
    assert sorted(os.listdir(world.disk)) == ["out"]


def test_the_newest_is_fetched_and_a_fresh_run_has_none(world: World) -> None:
    assert world.checkpoints.fetch_newest(world.log.state, world.disk / "in") == (None, None)
    world.publish(10)
    newest = world.publish(20)
    checkpoint, path = world.checkpoints.fetch_newest(world.log.state, world.disk / "in")
    assert (checkpoint, path) == (newest, world.disk / "in" / "step-000000020")


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (flip_a_byte, "sha256 is"),
        (lambda store, key: store.put(key, b""), "0 bytes, its record says"),
        (lambda store, key: store.delete([key]), "no such object"),
    ],
)
def test_a_damaged_newest_is_quarantined_and_the_one_before_is_used(
    world: World, harm: Callable[[MemoryStore, str], None], reason: str
) -> None:
    older = world.publish(10)
    newest = world.publish(20)
    harm(world.store, world.key(newest))

    checkpoint, path = world.checkpoints.fetch_newest(world.log.state, world.disk / "in", attempt=1)

    assert checkpoint == older
    assert path is not None
    assert read_files(path) == contents(10)
    said = world.log.entries()[-1].record
    assert isinstance(said, Quarantined)
    assert (said.checkpoint, said.attempt) == (newest.ref, 1)
    assert reason in said.reason
    assert "adapter.safetensors" in said.reason


def test_a_store_that_does_not_answer_quarantines_nothing(world: World) -> None:
    world.publish(10)
    away = CheckpointStore(FlakyStore(world.store, 1, Fault.REFUSE), RUN, world.log)
    with pytest.raises(Unavailable):
        away.fetch_newest(world.log.state, world.disk / "in", attempt=1)
    assert world.log.refresh().quarantined == ()


class BadNode(FlakyStore):
    """A store as a node sees it whose disk, memory or proxy damages whatever it downloads."""

    def __init__(self, store: ObjectStore) -> None:
        super().__init__(store, 0, Fault.REFUSE)

    def download(self, key: str, target: Path) -> None:
        super().download(key, target)
        target.write_bytes(b"X" + target.read_bytes()[1:])


def test_a_bad_node_gives_up_one_checkpoint_at_most_and_never_the_only_one(world: World) -> None:
    """Or one node would let the run begin anew, and its good checkpoints be swept."""
    for step in (10, 20, 30):
        world.publish(step)
    bad = CheckpointStore(BadNode(world.store), RUN, world.log)
    left = []
    for attempt in (2, 3, 4):
        world.log.append(ended(attempt - 1))
        world.log.append(claimed(attempt, node="bad"))
        with pytest.raises(Corrupt, match="sha256 is"):
            bad.fetch_newest(world.log.state, world.disk / "in", attempt=attempt)
        left.append([c.step for c in world.log.refresh().checkpoints])
    assert left == [[10, 20], [10], [10]]

    world.log.append(ended(4))
    world.log.append(claimed(5, node="good"))
    checkpoint, _ = world.checkpoints.fetch_newest(world.log.state, world.disk / "in", attempt=5)
    assert checkpoint is not None
    assert checkpoint.step == 10


@pytest.mark.parametrize(("nodes", "tries"), [(("n1", "n2"), 2), (("n1", "n1", "n1"), 3)])
def test_the_only_checkpoint_is_given_up_once_enough_have_found_it_damaged(
    world: World, nodes: tuple[str, ...], tries: int
) -> None:
    """Or a run whose only checkpoint is damaged would never go on."""
    only = world.publish(10)
    flip_a_byte(world.store, world.key(only))
    for attempt, node in enumerate(nodes, start=2):
        world.log.append(ended(attempt - 1))
        world.log.append(claimed(attempt, node=node))
        if attempt - 1 < tries:
            with pytest.raises(Corrupt):
                world.checkpoints.fetch_newest(world.log.state, world.disk / "in", attempt=attempt)
            assert world.log.refresh().newest == only
    fetched = world.checkpoints.fetch_newest(world.log.state, world.disk / "in", attempt=tries + 1)
    assert fetched == (None, None)
    assert [known for known, _ in world.log.state.quarantined] == [only.ref]


def test_an_attempt_that_is_over_gives_up_nothing(world: World) -> None:
    """It may wake in the middle of its fetch, on a node of which nobody knows what it is worth."""
    world.publish(10)
    newest = world.publish(20)
    seen_before = world.log.state
    world.log.append(ended(1))
    world.log.append(claimed(2))
    ghost = CheckpointStore(BadNode(world.store), RUN, run_log(world.store, RUN))
    with pytest.raises(Fenced, match="attempt 1 is fenced"):
        ghost.fetch_newest(seen_before, world.disk / "in", attempt=1)
    assert world.log.refresh().newest == newest


def test_a_reader_that_is_no_attempt_gives_up_nothing(world: World) -> None:
    world.publish(10)
    newest = world.publish(20)
    reader = CheckpointStore(BadNode(world.store), RUN, world.log)
    with pytest.raises(Corrupt):
        reader.fetch_newest(world.log.state, world.disk / "in")
    assert world.log.refresh().newest == newest


def test_a_checkpoint_that_was_retired_meanwhile_is_no_fault(world: World) -> None:
    world.publish(10)
    seen_before = world.log.state
    newer = world.publish(20)
    world.checkpoints.retire([ref(10)])
    world.checkpoints.reap(world.log.state)

    checkpoint, _ = world.checkpoints.fetch_newest(seen_before, world.disk / "in")

    assert checkpoint == newer
    assert world.log.refresh().quarantined == ()


def test_a_damaged_result_of_a_run_that_is_over_is_an_error(world: World) -> None:
    world.publish(10)
    result = world.publish(20, final=True)
    world.log.append(finished())
    flip_a_byte(world.store, world.key(result))
    with pytest.raises(Corrupt, match="sha256 is"):
        world.checkpoints.fetch_newest(world.log.state, world.disk / "in")


def test_a_step_that_does_not_exist_is_an_error_that_lists_those_that_do(world: World) -> None:
    world.publish(10)
    world.publish(20)
    message = "run cat-r16 has no checkpoint of step 15; there are: 10, 20"
    with pytest.raises(NotFound, match=message):
        world.checkpoints.fetch_step(world.log.state, 15, world.disk / "in")
    checkpoint, path = world.checkpoints.fetch_step(world.log.state, 10, world.disk / "in")
    assert checkpoint.step == 10
    assert read_files(path) == contents(10)


def test_the_newest_cannot_be_retired(world: World) -> None:
    world.publish(10)
    newest = world.publish(20)
    with pytest.raises(Fenced, match="is the newest checkpoint"):
        world.checkpoints.retire([newest.ref])
    assert world.checkpoints.retire([]) is None


def test_retired_data_goes_after_the_grace_period_and_only_its_own(world: World) -> None:
    world.publish(10)
    newest = world.publish(20)
    world.checkpoints.retire([ref(10)])

    world.checkpoints.reap(world.log.state, grace_s=60)
    assert len(world.data()) == 4
    world.seconds = 59.0
    world.checkpoints.reap(world.log.state, grace_s=60)
    assert len(world.data()) == 4
    world.seconds = 60.0
    world.checkpoints.reap(world.log.state, grace_s=60)

    assert world.data() == sorted(world.key(newest, name) for name in contents(20))
    assert world.log.state.retired == ()
    assert world.checkpoints.reap(world.log.state, grace_s=60) == world.log.state


def put_orphan(store: ObjectStore, attempt: int, step: int) -> str:
    key = layout.checkpoint_file(RUN, attempt, incarnation(attempt), step, "adapter.safetensors")
    store.put(key, b"never committed")
    return key


def test_only_what_no_attempt_can_commit_any_more_is_swept(world: World) -> None:
    world.publish(10)
    world.publish(20)
    world.checkpoints.retire([ref(10)])
    world.log.append(ended(1))
    world.log.append(claimed(2))
    old, in_flight, newer = (put_orphan(world.store, attempt, 30) for attempt in (1, 2, 3))
    named = set(world.data()) - {old, in_flight, newer}

    assert world.checkpoints.sweep_orphans(world.log.state) == 1
    assert set(world.data()) == named | {in_flight, newer}

    world.log.append(finished())
    assert world.checkpoints.sweep_orphans(world.log.state) == 1
    assert set(world.data()) == named | {newer}


def test_uploads_are_aborted_once_nobody_can_finish_them(world: World) -> None:
    aborted: list[str] = []

    class Uploads(FlakyStore):
        def abort_uploads(self, prefix: str) -> int:
            aborted.append(prefix)
            return 0

    checkpoints = CheckpointStore(Uploads(world.store, 0, Fault.REFUSE), RUN, world.log)
    checkpoints.sweep_orphans(world.log.state)
    assert aborted == []
    world.log.append(finished())
    checkpoints.sweep_orphans(world.log.state)
    assert aborted == [layout.data_prefix(RUN)]


def test_quarantined_data_is_kept_for_inspection_until_the_run_is_over(world: World) -> None:
    world.publish(10)
    bad = world.publish(20)
    world.log.append(Quarantined(checkpoint=bad.ref, reason="sha256", at=0.0))
    world.log.append(ended(1))
    world.log.append(claimed(2))
    assert world.checkpoints.sweep_orphans(world.log.state) == 0
    world.log.append(finished())
    assert world.checkpoints.sweep_orphans(world.log.state) == 2
    assert world.key(bad) not in world.data()
