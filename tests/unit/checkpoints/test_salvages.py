"""A part of a checkpoint that is sent in a hurry, and how long sending takes."""

from pathlib import Path

import pytest
from support.runs import claimed, ended, incarnation, read_files, write_checkpoint
from support.stored_run import linked, publish, trained

ADAPTER_ONLY = ("adapter.safetensors", "state.json")


def test_a_salvage_can_be_exported_and_nothing_resumes_from_it(tmp_path: Path) -> None:
    world, _ = linked(tmp_path)
    whole = publish(world, 10)
    salvage = publish(world, 20, only=ADAPTER_ONLY)

    state = world.log.refresh()
    assert not salvage.resumable
    assert (state.checkpoints, state.salvaged) == ((whole,), (salvage,))
    assert state.stored[-1] == salvage
    assert world.checkpoints.fetch_newest(state, world.disk / "in")[0] == whole
    _, path = world.checkpoints.fetch_step(state, 20, world.disk / "export")
    assert set(read_files(path)) == set(ADAPTER_ONLY)
    world.log.append(ended(1))
    world.log.append(claimed(2))
    assert world.checkpoints.sweep_orphans(world.log.state) == 0, "its data is not litter"
    assert world.checkpoints.fetch(salvage, world.disk / "again" / "step-000000020")


def test_the_whole_checkpoint_takes_the_place_of_its_salvage_and_sends_the_rest(tmp_path: Path) -> None:
    world, store = linked(tmp_path)
    publish(world, 20, only=ADAPTER_ONLY)
    assert len(store.puts) == 2
    whole = publish(world, 20)

    assert world.log.refresh().stored == (whole,)
    assert store.puts[2:] == ["optimizer.safetensors.shuffle4.zstd"]
    assert read_files(world.checkpoints.fetch(whole, world.disk / "in" / "step-000000020")) == trained(20)
    # The salvage again, its first reply having been lost: it is part of what is there.
    publish(world, 20, only=ADAPTER_ONLY)
    assert world.log.refresh().stored == (whole,)


def test_how_long_an_upload_takes_is_known_from_those_before(tmp_path: Path) -> None:
    world, _ = linked(tmp_path, bytes_s=1e5)
    local = write_checkpoint(world.disk / "out", 10, files=trained(10))
    assert world.checkpoints.upload_s(local, 1, incarnation(1)) is None
    world.checkpoints.publish(local, 1, incarnation(1))
    took_s = world.seconds
    newer = write_checkpoint(world.disk / "out", 20, files=trained(20))
    assert world.checkpoints.upload_s(newer, 1, incarnation(1)) == pytest.approx(took_s, rel=0.05)
    part_s = world.checkpoints.upload_s(newer, 1, incarnation(1), only=ADAPTER_ONLY)
    assert part_s == pytest.approx(took_s / 3, rel=0.05)
    world.checkpoints.publish(newer, 1, incarnation(1), only=ADAPTER_ONLY)
    assert world.checkpoints.upload_s(newer, 1, incarnation(1)) == pytest.approx(2 * took_s / 3, rel=0.05)
