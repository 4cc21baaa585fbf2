"""Fetching: the newest that is whole, bit by bit, or nothing."""

import os
from pathlib import Path

import pytest
from support.flaky_store import Fault, FlakyStore
from support.open_files import no_files_to_open
from support.runs import RUN, contents, read_files
from support.stored_run import World, flip_a_byte, linked, publish, trained

from storage.checkpoints import CheckpointStore
from storage.errors import Corrupt, InvalidName, NotFound, Unavailable
from storage.log import run_log
from storage.records import StoredFile


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

    with no_files_to_open(), pytest.raises(Unavailable, match="Too many open files"):
        world.checkpoints.fetch(committed, target)


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


def test_a_store_that_does_not_answer_quarantines_nothing(world: World) -> None:
    world.publish(10)
    away = CheckpointStore(FlakyStore(world.store, 1, Fault.REFUSE), RUN, world.log)
    with pytest.raises(Unavailable):
        away.fetch_newest(world.log.state, world.disk / "in", attempt=1)
    assert world.log.refresh().quarantined == ()


def test_a_step_that_does_not_exist_is_an_error_that_lists_those_that_do(world: World) -> None:
    world.publish(10)
    world.publish(20)
    message = "run cat-r16 has no checkpoint of step 15; there are: 10, 20"
    with pytest.raises(NotFound, match=message):
        world.checkpoints.fetch_step(world.log.state, 15, world.disk / "in")
    checkpoint, path = world.checkpoints.fetch_step(world.log.state, 10, world.disk / "in")
    assert checkpoint.step == 10
    assert read_files(path) == contents(10)


def test_a_checkpoint_retired_while_it_is_fetched_gives_way_to_the_next_newest(tmp_path: Path) -> None:
    """Row 36: the reader chose by an old state, and the pruner was faster."""
    world, store = linked(tmp_path)
    old = publish(world, 10)
    stale = world.log.state

    class Pruned(FlakyStore):
        """The checkpoint goes between its first file and its second."""

        def download(self, key: str, target: Path) -> None:
            super().download(key, target)
            if world.log.state.newest == old:
                newer = publish(world, 20)
                assert newer.step == 20
                world.checkpoints.retire([old.ref])
                world.checkpoints.reap(world.log.state)

    reader = CheckpointStore(Pruned(store, 0, Fault.REFUSE), RUN, run_log(store, RUN))
    checkpoint, path = reader.fetch_newest(stale, world.disk / "in", attempt=1)
    assert (checkpoint.step if checkpoint else None) == 20
    assert path is not None
    assert read_files(path) == trained(20)
    assert world.log.refresh().quarantined == (), "nobody is to blame"
