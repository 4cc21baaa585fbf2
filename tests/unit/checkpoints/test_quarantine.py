"""A damaged checkpoint is given up only by who may, and the only one not on the word of one node."""

from collections.abc import Callable
from pathlib import Path

import pytest
from support.flaky_store import Fault, FlakyStore
from support.runs import RUN, claimed, contents, ended, finished, read_files, ref
from support.stored_run import World, flip_a_byte

from storage.checkpoints import CheckpointStore
from storage.errors import Corrupt, Fenced
from storage.log import run_log
from storage.memory import MemoryStore
from storage.object_store import ObjectStore
from storage.records import Quarantined


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
