"""A controller that starts goes on with what another one left: it adopts, and reads no more than is new."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.fake_cluster import FILE, FakeCluster, small_sweep
from support.sweeps import (
    R0,
    R1,
    Counting,
    assert_well_ended,
    finish,
    records,
    state,
    stored_data,
    ticks,
    under_way,
    wait_for,
)

from orchestrator.control.controller import Controller
from orchestrator.control.sweep_snapshot import EVERY_S
from orchestrator.grid.schema import Checkpoint
from storage import layout
from storage.errors import Unavailable
from storage.log import Snapshot, run_log
from storage.memory import MemoryStore
from storage.object_store import ObjectInfo
from storage.records import CancelRequested, EndReason
from storage.run_state import RunState
from storage.snapshots import LONG, Known, hinted_log, read_run, write_sweep


def test_a_controller_that_starts_again_adopts_what_trains_and_starts_nothing() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=2, max_steps=20)
    cluster = FakeCluster(store, sweep)
    ticks(Controller(sweep, store, cluster, cluster.clock), cluster, 5)
    before = {run.run_id: state(store, run.run_id).attempt for run in sweep.runs}

    again = Controller(sweep, store, cluster, cluster.clock)
    ticks(again, cluster, 5)

    assert {run.run_id: state(store, run.run_id).attempt for run in sweep.runs} == before
    finish(again, cluster)
    assert [order.attempt for order in cluster.begun] == [1, 1]
    assert_well_ended(store, sweep, cluster)


def test_a_controller_that_starts_again_does_not_take_a_slot_that_is_not_heard_of_yet_for_lost() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=1, max_steps=20)
    cluster = FakeCluster(store, sweep)
    ticks(Controller(sweep, store, cluster, cluster.clock), cluster, 5)
    cluster.silence("n1/0")

    again = Controller(sweep, store, cluster, cluster.clock)
    ticks(again, cluster, 5)
    cluster.hear("n1/0")
    finish(again, cluster)

    assert [order.attempt for order in cluster.begun] == [1]


def test_a_new_cluster_goes_on_where_the_old_one_was_lost_as_a_whole() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=2, max_steps=20)
    old = FakeCluster(store, sweep)
    ticks(Controller(sweep, store, old, old.clock), old, 8)

    new = FakeCluster(store, sweep, name="m")
    finish(Controller(sweep, store, new, new.clock), new)

    assert_well_ended(store, sweep, new)
    assert [order.attempt for order in new.begun] == [2, 2]
    first = state(store, R0).attempts[0].ended
    assert first is not None
    assert (first.reason, first.detail) == (
        EndReason.NODE_LOST,
        "n1 is not part of the cluster any more",
    )


def test_a_sweep_that_is_over_is_left_alone() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=2)
    cluster = FakeCluster(store, sweep)
    finish(Controller(sweep, store, cluster, cluster.clock), cluster)
    before = {info.key: store.get(info.key) for info in store.list("")}

    finish(Controller(sweep, store, cluster, cluster.clock), cluster)

    assert {info.key: store.get(info.key) for info in store.list("")} == before
    assert len(cluster.begun) == 2


SNAPSHOT = layout.sweep_snapshot("cat")


def test_a_start_over_runs_that_are_over_asks_for_the_snapshot_and_for_nothing_else() -> None:
    store, sweep = Counting(), small_sweep(runs=30, max_steps=3)
    cluster = FakeCluster(store, sweep, nodes=10)
    finish(Controller(sweep, store, cluster, cluster.clock), cluster)
    before = [state(store, run.run_id) for run in sweep.runs]
    store.take()

    controller = Controller(sweep, store, cluster, cluster.clock)
    controller.tick()

    assert store.take() == [f"get {SNAPSHOT}", f"head {SNAPSHOT}"]
    assert controller.done
    assert list(controller.states.values()) == before


def test_a_start_lists_each_log_that_is_not_over_once_and_reads_only_what_is_new() -> None:
    store, sweep = Counting(), small_sweep(runs=6, max_steps=40)
    cluster = FakeCluster(store, sweep, nodes=3, commit_every=100)
    first = Controller(sweep, store, cluster, cluster.clock)
    ticks(first, cluster, 2)
    cluster.now += EVERY_S
    first.tick()
    wait_for(lambda: store.head(SNAPSHOT) is not None)
    run_log(store, R1).append(CancelRequested(at=0.0))
    known = len(records(store, R1))
    store.take()

    Controller(sweep, store, cluster, cluster.clock)._begin()

    assert store.take() == sorted(
        [
            f"get {SNAPSHOT}",
            f"head {SNAPSHOT}",
            f"get {layout.log_entry(layout.run_log_prefix(R1), known - 1)}",
            *(f"list {layout.run_log_prefix(run.run_id)}" for run in sweep.runs),
        ]
    )


@pytest.mark.parametrize("damage", [b"", b"\x00" * 1000, b"orchestrate-snapshot 1 0 0\n"])
def test_a_start_over_a_snapshot_that_is_no_good_knows_as_much(damage: bytes) -> None:
    store, sweep = MemoryStore(), small_sweep(runs=3)
    cluster = FakeCluster(store, sweep)
    first = Controller(sweep, store, cluster, cluster.clock)
    finish(first, cluster)
    store.put(SNAPSHOT, damage)

    controller = Controller(sweep, store, cluster, cluster.clock)
    controller.tick()

    assert controller.done
    assert controller.states == first.states
    assert store.get(SNAPSHOT) != damage, "it is written anew"


@pytest.mark.parametrize(
    "false",
    [
        pytest.param(lambda s: replace(s, checkpoints=()), id="it knows of no checkpoint"),
        pytest.param(lambda s: replace(s, checkpoints=(), retired=s.checkpoints), id="all are retired"),
    ],
)
def test_nothing_is_deleted_on_the_word_of_a_snapshot_that_its_log_does_not_follow_from(
    false: Callable[[RunState], RunState],
) -> None:
    store, sweep = MemoryStore(), small_sweep(runs=1)
    cluster = FakeCluster(store, sweep)
    finish(Controller(sweep, store, cluster, cluster.clock), cluster)
    log = run_log(store, R0)
    forged = Snapshot(next_seq=len(records(store, R0)), digest="0" * 64, state=false(log.refresh()))
    write_sweep(store, sweep.name, {R0: Known(snapshot=forged)})
    before = stored_data(store, R0)

    controller = Controller(sweep, store, cluster, cluster.clock)
    finish(controller, cluster)
    assert stored_data(store, R0) == before != []
    assert controller.states[R0] == state(store, R0)


class WithoutSnapshots(MemoryStore):
    """Takes everything but snapshots."""

    def put(self, key: str, body: bytes | Path) -> None:
        if key.endswith("snapshot.json.zst"):
            raise Unavailable("503")
        super().put(key, body)

    def head(self, key: str) -> ObjectInfo | None:
        if key.endswith("snapshot.json.zst"):
            raise Unavailable("503")
        return super().head(key)


def test_without_any_snapshot_a_sweep_begins_later_and_ends_as_well(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store, sweep = WithoutSnapshots(), small_sweep(runs=2)
    cluster = FakeCluster(store, sweep)

    with caplog.at_level(logging.WARNING, logger="orchestrator"):
        finish(Controller(sweep, store, cluster, cluster.clock), cluster)

    assert_well_ended(store, sweep, cluster)
    assert caplog.messages == [
        "the sweep's snapshot cannot be read: 503; trying again",
        "the sweep's snapshot cannot be read: 503; every log is read instead",
        "the sweep's snapshot cannot be written, the next start takes longer: 503",
    ]


def test_a_long_log_gets_a_snapshot_of_its_own_that_its_next_attempt_starts_from() -> None:
    store, sweep = Counting(), small_sweep(runs=1, max_steps=3 * LONG, checkpoint=Checkpoint(keep_last=2))
    cluster, controller = under_way(store, sweep, 0, commit_every=1)
    ticks(controller, cluster, LONG)
    wait_for(lambda: read_run(store, R0) is not None)
    snapshot = read_run(store, R0)
    assert snapshot is not None
    assert snapshot.next_seq >= LONG
    store.take()

    log = hinted_log(store, R0)
    assert log.refresh() == state(store, R0)
    assert len([asked for asked in store.take() if asked.startswith("get")]) < len(records(store, R0)) * 2


def test_what_a_ghost_leaves_after_the_end_is_deleted_by_the_next_controller_and_looked_for_once() -> None:
    store, sweep = Counting(), small_sweep(runs=1, max_steps=20)
    cluster, controller = under_way(store, sweep, 3)
    ghost = state(store, R0).attempts[0].claimed
    cluster.lose_node("n1")
    finish(controller, cluster)
    store.put(layout.checkpoint_file(R0, 1, ghost.incarnation, 9, FILE), b"late")

    finish(Controller(sweep, store, cluster, cluster.clock), cluster)

    assert len(stored_data(store, R0)) == len(state(store, R0).checkpoints)
    store.take()
    Controller(sweep, store, cluster, cluster.clock).tick()
    assert store.take() == [f"get {SNAPSHOT}", f"head {SNAPSHOT}"]
