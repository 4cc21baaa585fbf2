"""What the controller deletes, and what it keeps."""

import logging
from collections.abc import Iterable

import pytest
from support.fake_cluster import FILE, FakeCluster, small_sweep
from support.sweeps import (
    R0,
    R1,
    assert_well_ended,
    fake_commit,
    finish,
    state,
    stored_data,
    ticks,
    under_way,
)

from orchestrator.control.controller import Controller
from orchestrator.grid.schema import Checkpoint, Metric
from storage import layout
from storage.errors import AccessDenied
from storage.log import run_log
from storage.memory import MemoryStore
from storage.records import CheckpointRef, Pinned, Started


def test_what_a_fenced_attempt_uploaded_is_swept_when_its_run_ends() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=1)
    cluster, controller = under_way(store, sweep, 3)
    incarnation = cluster.begun[0].incarnation
    orphan = layout.checkpoint_file(R0, 1, incarnation, 5, FILE)
    store.put(orphan, b"uploaded, never committed")

    cluster.lose_node("n1")
    finish(controller, cluster)

    assert orphan not in stored_data(store, R0)


def test_the_policy_keeps_the_best_and_every_so_many() -> None:
    store = MemoryStore()
    sweep = small_sweep(
        runs=1,
        max_steps=12,
        metric=Metric(name="val/loss", goal="maximize"),
        checkpoint=Checkpoint(keep_last=1, keep_every=6, keep_best=1, grace_s=0.0),
    )
    cluster = FakeCluster(store, sweep, commit_every=2)

    finish(Controller(sweep, store, cluster, cluster.clock), cluster)

    assert [c.step for c in state(store, R0).checkpoints] == [2, 6, 12]


def test_what_the_live_attempt_may_still_be_reading_is_not_retired() -> None:
    store = MemoryStore()
    sweep = small_sweep(runs=1, max_steps=20, checkpoint=Checkpoint(keep_last=1, grace_s=1e9))
    cluster, controller = under_way(store, sweep, 6)
    cluster.lose_node("n1")
    cluster.lose_orders = 99
    controller.tick()
    running = state(store, R0).running
    assert running is not None
    resumed_from = CheckpointRef(step=running.resumed_from, attempt=1)

    # It commits without ever having said that it started: that record may be lost.
    log = run_log(store, R0)
    for step in (8, 10):
        log.append(fake_commit(running.claimed, step))
    ticks(controller, cluster, 7)
    assert [c.step for c in log.refresh().checkpoints] == [running.resumed_from, 10]
    assert log.state.restorable(resumed_from) is not None

    log.append(Started(attempt=2, step=running.resumed_from, at=0.0))
    ticks(controller, cluster, 7)
    assert [c.step for c in log.refresh().checkpoints] == [10]


def test_what_a_person_has_pinned_is_not_retired() -> None:
    store, sweep = (
        MemoryStore(),
        small_sweep(runs=1, max_steps=9, checkpoint=Checkpoint(keep_last=1, grace_s=0.0)),
    )
    cluster, controller = under_way(store, sweep, 4, commit_every=2)
    run_log(store, R0).append(Pinned(checkpoint=CheckpointRef(step=2, attempt=1), at=0.0))

    finish(controller, cluster)

    assert [c.step for c in state(store, R0).checkpoints] == [2, 9]


class KeepsEverything(MemoryStore):
    """A store whose credentials do not allow to delete."""

    def delete(self, keys: Iterable[str]) -> None:
        if list(keys):
            raise AccessDenied("s3:DeleteObject is not allowed")


def test_a_store_that_refuses_to_delete_is_told_once_a_run_and_stops_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store, sweep = (
        KeepsEverything(),
        small_sweep(runs=2, max_steps=20, checkpoint=Checkpoint(keep_last=1, grace_s=0.0)),
    )
    cluster, controller = under_way(store, sweep, 0, nodes=1)

    with caplog.at_level(logging.WARNING, logger="orchestrator.control.controller"):
        ticks(controller, cluster, 8)
        cluster.lose_node("n1")
        cluster.add_node()
        finish(controller, cluster)

    assert_well_ended(store, sweep, cluster)
    assert sorted(caplog.messages) == [
        f"{run_id}: nothing can be deleted: s3:DeleteObject is not allowed" for run_id in (R0, R1)
    ]
