"""Deleting: what was retired, what no attempt can commit any more, and what is kept for inspection."""

import pytest
from support.flaky_store import Fault, FlakyStore
from support.runs import RUN, claimed, contents, ended, finished, incarnation, ref
from support.stored_run import World

from storage import layout
from storage.checkpoints import CheckpointStore
from storage.errors import Fenced
from storage.object_store import ObjectStore
from storage.records import Quarantined


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
