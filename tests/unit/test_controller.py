"""The controller on a cluster in virtual time: whatever befalls the cluster, every run ends once and well."""

import logging
import math
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.fake_cluster import FILE, FakeCluster, run_to_end, small_sweep, weights_at

from orchestrator.commands.cancelling import ask_to_cancel
from orchestrator.control.cluster import Health, Listening, Order, Slot
from orchestrator.control.controller import REFRESH_S, Controller
from orchestrator.control.steering import AGAIN_S
from orchestrator.control.sweep_snapshot import EVERY_S
from orchestrator.grid.schema import Checkpoint, Metric, Recovery
from orchestrator.grid.sweep import Sweep
from orchestrator.reports.view import Status, read_rows
from storage import layout
from storage.errors import AccessDenied, Fenced, Unavailable
from storage.log import Snapshot, run_log
from storage.memory import MemoryStore
from storage.object_store import ObjectInfo, ObjectStore
from storage.records import (
    CancelRequested,
    CheckpointRef,
    Claimed,
    Committed,
    Ended,
    EndReason,
    Finished,
    Outcome,
    Pinned,
    Quarantined,
    Record,
    Retired,
    Started,
    StoredFile,
)
from storage.run_state import RunState
from storage.snapshots import LONG, Known, hinted_log, read_run, write_sweep

R0, R1 = "cat-0-00000000", "cat-1-00000001"


def records(store: ObjectStore, run_id: str) -> list[Record]:
    log = run_log(store, run_id)
    log.refresh()
    return [entry.record for entry in log.entries()]


def state(store: ObjectStore, run_id: str) -> RunState:
    return run_log(store, run_id).refresh()


def told(store: ObjectStore, run_id: str) -> list[str]:
    """A run's log in short: kinds, with attempt numbers and steps."""
    words = []
    for record in records(store, run_id):
        match record:
            case Claimed(attempt=attempt):
                words.append(f"claimed {attempt}")
            case Committed(step=step):
                words.append(f"committed {step}")
            case Ended(attempt=attempt, reason=reason):
                words.append(f"ended {attempt} {reason}")
            case Finished(outcome=outcome):
                words.append(f"finished {outcome}")
            case other:
                words.append(other.kind)
    return words


def stored_data(store: ObjectStore, run_id: str) -> list[str]:
    return [info.key for info in store.list(layout.data_prefix(run_id))]


def finish(controller: Controller, cluster: FakeCluster, misfortunes: random.Random | None = None) -> None:
    for _ in run_to_end(controller, cluster, misfortunes=misfortunes):
        pass


def ticks(controller: Controller, cluster: FakeCluster, number: int) -> None:
    for _ in range(number):
        controller.tick()
        cluster.advance()


def assert_well_ended(store: ObjectStore, sweep: Sweep, cluster: FakeCluster) -> None:
    """One result a run, the right bytes, no attempt twice, nothing committed that was not resumed from."""
    begun = [(order.run_id, order.attempt) for order in cluster.begun]
    assert len(set(begun)) == len(begun), "an attempt was started twice"
    for run in sweep.runs:
        history = records(store, run.run_id)
        ends = [record for record in history if isinstance(record, Finished)]
        assert [end.outcome for end in ends] == [Outcome.SUCCEEDED], told(store, run.run_id)
        over = state(store, run.run_id)
        assert over.result is not None
        final = store.get(layout.committed_file(run.run_id, over.result, FILE))
        assert final == weights_at(run.run_id, run.spec.base.max_train_steps), "trained from other bytes"
        check_resumptions(history)


def check_resumptions(history: Sequence[Record]) -> None:
    """No committed step is ever trained again."""
    committed = 0
    for record in history:
        if isinstance(record, Committed):
            assert record.step > committed or record.final
            committed = record.step
        if isinstance(record, Started):
            assert record.step == committed, "committed work was lost"


def test_a_calm_sweep_runs_each_run_once_and_keeps_what_its_policy_keeps() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=3, checkpoint=Checkpoint(keep_last=1, grace_s=0.0))
    cluster = FakeCluster(store, sweep, nodes=2)

    finish(Controller(sweep, store, cluster, cluster.clock), cluster)

    assert_well_ended(store, sweep, cluster)
    for run in sweep.runs:
        over = state(store, run.run_id)
        assert [c.step for c in over.checkpoints] == [6]
        assert over.retired == ()
        assert stored_data(store, run.run_id) == [
            layout.committed_file(run.run_id, over.checkpoints[0], FILE)
        ]
    assert [order.attempt for order in cluster.begun] == [1, 1, 1]


def test_a_lost_node_costs_its_run_the_steps_since_the_last_commit_and_another_node_goes_on() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=1, max_steps=9)
    cluster = FakeCluster(store, sweep, nodes=2, commit_every=4)
    controller = Controller(sweep, store, cluster, cluster.clock)
    ticks(controller, cluster, 7)
    assert cluster.busy() == ["n1/0"]

    cluster.lose_node("n1")
    finish(controller, cluster)

    assert_well_ended(store, sweep, cluster)
    attempts = state(store, R0).attempts
    assert [a.claimed.node for a in attempts] == ["n1", "n2"]
    ended = attempts[0].ended
    assert ended is not None
    assert (ended.reason, ended.step, ended.step_s, ended.detail) == (
        EndReason.NODE_LOST,
        7,
        1.0,
        "n1 was lost without notice",
    )
    assert attempts[1].resumed_from == 4


def test_a_lost_agent_is_told_from_a_lost_node() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=1)
    cluster = FakeCluster(store, sweep)
    controller = Controller(sweep, store, cluster, cluster.clock)
    ticks(controller, cluster, 3)

    cluster.lose_agent("n1/0")
    finish(controller, cluster)

    ended = state(store, R0).attempts[0].ended
    assert ended is not None
    assert (ended.reason, ended.detail) == (EndReason.AGENT_LOST, "the agent on n1 died")


def test_silence_is_no_death_before_it_lasts_too_long() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=1, max_steps=20)
    cluster = FakeCluster(store, sweep)
    controller = Controller(sweep, store, cluster, cluster.clock)
    ticks(controller, cluster, 3)

    cluster.silence("n1/0")
    ticks(controller, cluster, 10)
    cluster.hear("n1/0")
    finish(controller, cluster)

    assert [order.attempt for order in cluster.begun] == [1]
    assert_well_ended(store, sweep, cluster)


def test_after_too_long_a_silence_another_attempt_takes_over_and_the_ghost_is_fenced() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=1, max_steps=30)
    cluster = FakeCluster(store, sweep)
    controller = Controller(sweep, store, cluster, cluster.clock)
    ticks(controller, cluster, 3)

    cluster.freeze("n1/0")
    ticks(controller, cluster, 17)
    assert cluster.busy() == ["n1/0", "n2/0"]
    cluster.hear("n1/0")
    cluster.advance(2)
    assert cluster.busy() == ["n2/0"], "the ghost did not notice the fence"
    finish(controller, cluster)

    ended = state(store, R0).attempts[0].ended
    assert ended is not None
    assert (ended.reason, ended.detail, ended.silent_s) == (
        EndReason.NODE_UNREACHABLE,
        "n1 did not answer for 13 s",
        11.0,  # since its last commit was seen
    )
    assert_well_ended(store, sweep, cluster)


def test_a_ghost_that_is_heard_of_again_is_asked_to_stop_at_once() -> None:
    """Its next commit would be refused, but that may be an hour away, and the slot is needed."""
    store, sweep = MemoryStore(), small_sweep(runs=1, max_steps=60)
    cluster = FakeCluster(store, sweep, commit_every=50)
    controller = Controller(sweep, store, cluster, cluster.clock)
    ticks(controller, cluster, 3)
    cluster.silence("n1/0")
    ticks(controller, cluster, 14)
    assert cluster.busy() == ["n1/0", "n2/0"]

    cluster.hear("n1/0")
    ticks(controller, cluster, 2)

    assert cluster.busy() == ["n2/0"]
    finish(controller, cluster)
    assert_well_ended(store, sweep, cluster)


def test_a_lost_order_is_repeated_and_starts_one_attempt() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=1)
    cluster = FakeCluster(store, sweep)
    controller = Controller(sweep, store, cluster, cluster.clock)

    cluster.lose_orders = 3
    finish(controller, cluster)

    assert [order.attempt for order in cluster.begun] == [1]
    assert_well_ended(store, sweep, cluster)


class Overheard(FakeCluster):
    """Keeps what it is told to do."""

    told: list[str]

    def start(self, slot: str, order: Order) -> None:
        self.told.append(f"start {slot}")
        super().start(slot, order)

    def stop(self, slot: str, run_id: str, attempt: int, grace_s: float) -> None:
        self.told.append(f"stop {slot}")  # and does nothing, as one that takes its time


def test_nobody_is_told_the_same_again_before_it_had_time_to_do_it() -> None:
    store, sweep = Counting(), small_sweep(runs=20, max_steps=600)
    cluster = Overheard(store, sweep, nodes=20, commit_every=500)
    cluster.told = []
    controller = Controller(sweep, store, cluster, cluster.clock)
    cluster.lose_orders = 20
    controller.tick()
    assert len(cluster.told) == 20
    store.take()

    for _ in range(10):
        controller.tick()
    assert len(cluster.told) == 20, "the orders are on their way"
    assert store.take() == []
    cluster.now += AGAIN_S
    for _ in range(10):
        controller.tick()
    assert len(cluster.told) == 40, "or were lost"
    assert store.take() == sorted(f"list {layout.run_log_prefix(run.run_id)}" for run in sweep.runs)

    ticks(controller, cluster, 3)
    cluster.told.clear()
    controller.cancel(run.run_id for run in sweep.runs)
    for _ in range(10):
        controller.tick()
    assert sorted(cluster.told) == sorted(f"stop {slot}" for slot in cluster.busy())
    cluster.now += AGAIN_S
    controller.tick()
    assert len(cluster.told) == 40


def test_a_trainer_that_stalls_is_tried_again_elsewhere_after_a_wait_and_fails_in_the_end() -> None:
    store = MemoryStore()
    sweep = small_sweep(runs=1, recovery=Recovery(max_failures=3, backoff_s=4.0, max_backoff_s=60.0))
    cluster = FakeCluster(store, sweep, nodes=2, commit_every=5)
    controller = Controller(sweep, store, cluster, cluster.clock)

    for number, _ in enumerate(run_to_end(controller, cluster)):
        for slot in cluster.busy():
            cluster.exit(slot, 1, error=f"ValueError: {number}")

    over = state(store, R0)
    assert over.outcome is Outcome.FAILED
    assert [a.claimed.node for a in over.attempts] == ["n1", "n2", "n1"]
    ends = [a.ended.at for a in over.attempts if a.ended]
    starts = [a.claimed.at for a in over.attempts]
    assert [start - end for start, end in zip(starts[1:], ends, strict=False)] == [4.0, 8.0]
    assert over.finished is not None
    assert over.finished.detail.endswith("no new checkpoint in 3 attempts (step 0)")


def test_one_run_that_fails_does_not_keep_the_others_from_succeeding() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=2)
    cluster = FakeCluster(store, sweep, nodes=1)
    controller = Controller(sweep, store, cluster, cluster.clock)
    ticks(controller, cluster, 2)

    cluster.exit("n1/0", 78, error="BadInput: no images")
    finish(controller, cluster)

    assert (state(store, R0).outcome, state(store, R1).outcome) == (Outcome.FAILED, Outcome.SUCCEEDED)
    assert controller.states[R0].finished == state(store, R0).finished


@pytest.mark.parametrize("seed", range(40))
def test_a_storm_of_misfortunes_ends_with_every_result_right(seed: int) -> None:
    store = MemoryStore()
    sweep = small_sweep(
        runs=4,
        max_steps=25,
        checkpoint=Checkpoint(keep_last=2, grace_s=0.0),
        recovery=Recovery(max_failures=50, backoff_s=1.0, silence_s=6.0),
    )
    cluster = FakeCluster(store, sweep, nodes=3, commit_every=3)

    finish(Controller(sweep, store, cluster, cluster.clock), cluster, random.Random(seed))

    assert_well_ended(store, sweep, cluster)
    cluster.hear_all()
    cluster.advance(30)  # whatever nobody sees trains on until it is fenced
    assert cluster.busy() == []
    finish(Controller(sweep, store, cluster, cluster.clock), cluster)
    for run in sweep.runs:
        over = state(store, run.run_id)
        kept = [layout.committed_file(run.run_id, c, FILE) for c in over.checkpoints]
        assert stored_data(store, run.run_id) == sorted(kept), "litter"
        assert len(kept) == 2


def test_the_storms_above_are_storms() -> None:
    """Guards the test above against a cluster on which nothing goes wrong."""
    reasons: set[EndReason] = set()
    fenced = 0
    for seed in range(10):
        store, sweep = MemoryStore(), small_sweep(runs=4, max_steps=25, recovery=Recovery(max_failures=50))
        cluster = FakeCluster(store, sweep, nodes=3, commit_every=3)
        finish(Controller(sweep, store, cluster, cluster.clock), cluster, random.Random(seed))
        attempts = [a for run in sweep.runs for a in state(store, run.run_id).attempts]
        reasons |= {a.ended.reason for a in attempts if a.ended}
        fenced += sum(ghost.superseded for ghost in cluster.ghosts)
    assert reasons >= {EndReason.NODE_LOST, EndReason.AGENT_LOST, EndReason.KILLED, EndReason.DRAINED}
    assert fenced > 0


def test_what_a_fenced_attempt_uploaded_is_swept_when_its_run_ends() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=1)
    cluster = FakeCluster(store, sweep)
    controller = Controller(sweep, store, cluster, cluster.clock)
    ticks(controller, cluster, 3)
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
    cluster = FakeCluster(store, sweep)
    controller = Controller(sweep, store, cluster, cluster.clock)
    ticks(controller, cluster, 6)
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


def fake_commit(claimed: Claimed, step: int) -> Committed:
    file = StoredFile(name=FILE, size_bytes=1, sha256="0" * 64)
    return Committed(
        attempt=claimed.attempt, incarnation=claimed.incarnation, step=step, files=(file,), at=0.0
    )


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


def test_cancelling_lets_trainers_save_themselves_and_ends_every_run() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=3, max_steps=20)
    cluster = FakeCluster(store, sweep, nodes=2, commit_every=10)
    controller = Controller(sweep, store, cluster, cluster.clock)
    ticks(controller, cluster, 4)

    controller.cancel([run.run_id for run in sweep.runs])
    finish(controller, cluster)

    assert [state(store, run.run_id).outcome for run in sweep.runs] == [Outcome.CANCELLED] * 3
    assert told(store, R0)[-3:] == ["committed 4", "ended 1 DRAINED", "finished CANCELLED"]
    assert state(store, sweep.runs[2].run_id).attempts == ()
    assert cluster.busy() == []


def test_cancelling_a_run_whose_node_is_lost_ends_it_and_brings_it_back_never() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=1, max_steps=20)
    cluster = FakeCluster(store, sweep)
    controller = Controller(sweep, store, cluster, cluster.clock)
    ticks(controller, cluster, 4)

    cluster.silence("n1/0")
    controller.cancel([R0])
    ticks(controller, cluster, 3)
    cluster.lose_node("n1")
    finish(controller, cluster)

    assert state(store, R0).outcome is Outcome.CANCELLED
    assert len(cluster.begun) == 1


@pytest.mark.parametrize("through_controller", [True, False])
def test_one_run_that_cannot_be_asked_to_stop_keeps_no_other_from_it(through_controller: bool) -> None:
    inner, sweep = MemoryStore(), small_sweep(runs=3, max_steps=60)
    store, cluster = Outage(inner), FakeCluster(inner, sweep, nodes=3)
    controller = Controller(sweep, store, cluster, cluster.clock)
    ticks(controller, cluster, 4)
    store.away, store.where = True, layout.run_prefix(R0)
    run_ids = [run.run_id for run in sweep.runs]
    alone = partial(ask_to_cancel, store, controller=None, atomic=True)
    with pytest.raises(Unavailable):
        (controller.cancel if through_controller else alone)(run_ids)
    assert [state(inner, run_id).cancel_requested for run_id in run_ids] == [False, True, True]
    store.away = False
    controller.cancel([R0])
    finish(controller, cluster)
    assert {s.outcome for s in controller.states.values()} == {Outcome.CANCELLED}


def test_cancelling_what_is_over_changes_nothing() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=1)
    cluster = FakeCluster(store, sweep)
    controller = Controller(sweep, store, cluster, cluster.clock)
    finish(controller, cluster)
    before = told(store, R0)

    controller.cancel([R0])

    assert told(store, R0) == before


def test_a_cancel_that_somebody_else_wrote_into_the_log_is_obeyed() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=2, max_steps=400)
    cluster = FakeCluster(store, sweep, nodes=1)
    controller = Controller(sweep, store, cluster, cluster.clock)
    ticks(controller, cluster, 4)

    other = Controller(sweep, store, FakeCluster(store, sweep, nodes=0), cluster.clock)
    other.cancel([R0, R1])
    ticks(controller, cluster, 70)

    assert state(store, R0).outcome is state(store, R1).outcome is Outcome.CANCELLED


class Outage:
    """A store that is away for as long as ``away`` says, or only what lies at ``where``."""

    def __init__(self, inner: ObjectStore) -> None:
        self._inner = inner
        self.away = False
        self.where = ""

    def __getattr__(self, name: str) -> Any:
        if self.away and not self.where and name != "url":
            raise Unavailable("503 SlowDown")
        return getattr(self._inner, name)

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        if self.away and prefix.startswith(self.where):
            raise Unavailable("503 SlowDown")
        return self._inner.list(prefix, after)


@pytest.mark.parametrize("begins", [0, 1, 3, 6, 8])
def test_a_store_that_is_away_delays_the_controller_and_changes_nothing_else(
    begins: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.log.PAUSES_S", (0.0,) * 4)
    inner, sweep = MemoryStore(), small_sweep(runs=2)
    store, cluster = Outage(inner), FakeCluster(inner, sweep, nodes=1)
    controller = Controller(sweep, store, cluster, cluster.clock)

    for tick in run_to_end(controller, cluster):
        store.away = begins <= tick < begins + 15

    assert_well_ended(inner, sweep, cluster)
    assert [order.attempt for order in cluster.begun] == [1, 1]


@pytest.mark.parametrize("jump_s", [-86_400.0, 86_400.0])
def test_a_clock_that_is_set_delays_nothing(jump_s: float) -> None:
    inner, sweep = MemoryStore(), small_sweep(max_steps=20)
    store, cluster = Outage(inner), FakeCluster(inner, sweep)
    jumped_s = 0.0
    controller = Controller(
        sweep, store, cluster, lambda: cluster.clock() + jumped_s, monotonic=cluster.clock
    )
    ticks(controller, cluster, 4)
    store.away = True
    ticks(controller, cluster, 7)
    assert [s.outcome for s in controller.states.values()] == [None, None]
    store.away, jumped_s = False, jump_s
    ticks(controller, cluster, 60)
    assert_well_ended(inner, sweep, cluster)


def test_an_end_that_was_written_by_a_clock_that_is_ahead_is_waited_for_as_any_other() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=1)
    cluster = FakeCluster(store, sweep)
    log = run_log(store, R0)
    log.append(Claimed(attempt=1, incarnation="0badcafe", node="n1", slot="n1/0", at=0.0))
    log.append(Ended(attempt=1, reason=EndReason.APP_ERROR, at=cluster.clock() + 86_400.0))
    controller = Controller(sweep, store, cluster, cluster.clock)
    ticks(controller, cluster, 1)
    assert state(store, R0).attempt == 1, "there is a wait"
    ticks(controller, cluster, 60)
    assert_well_ended(store, sweep, cluster)


def test_a_store_that_is_away_is_told_once_and_not_every_tick(caplog: pytest.LogCaptureFixture) -> None:
    inner, sweep = MemoryStore(), small_sweep(runs=1)
    store, cluster = Outage(inner), FakeCluster(inner, sweep)
    controller = Controller(sweep, store, cluster, cluster.clock)
    store.away = True

    with caplog.at_level(logging.WARNING, logger="orchestrator.control.controller"):
        ticks(controller, cluster, 20)
        store.away = False
        finish(controller, cluster)

    assert caplog.messages == ["the sweep's snapshot cannot be read: 503 SlowDown; trying again"]


def test_a_store_that_goes_away_is_told_once_a_run_and_not_every_tick(
    caplog: pytest.LogCaptureFixture,
) -> None:
    inner, sweep = MemoryStore(), small_sweep(runs=1)
    store, cluster = Outage(inner), FakeCluster(inner, sweep)
    controller = Controller(sweep, store, cluster, cluster.clock)

    with caplog.at_level(logging.WARNING, logger="orchestrator"):
        ticks(controller, cluster, 2)
        store.away = True
        ticks(controller, cluster, 20)
        store.away = False
        finish(controller, cluster)

    assert caplog.messages == [f"{R0}: Unavailable: 503 SlowDown; trying again"]


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
    cluster = FakeCluster(store, sweep, nodes=1)
    controller = Controller(sweep, store, cluster, cluster.clock)

    with caplog.at_level(logging.WARNING, logger="orchestrator.control.controller"):
        ticks(controller, cluster, 8)
        cluster.lose_node("n1")
        cluster.add_node()
        finish(controller, cluster)

    assert_well_ended(store, sweep, cluster)
    assert sorted(caplog.messages) == [
        f"{run_id}: nothing can be deleted: s3:DeleteObject is not allowed" for run_id in (R0, R1)
    ]


def test_a_damaged_log_ends_its_run_and_no_other_and_nothing_is_appended_to_it() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=2)
    cluster = FakeCluster(store, sweep, nodes=1)
    store.put(layout.log_entry(layout.run_log_prefix(R0), 0), b"not a record")
    controller = Controller(sweep, store, cluster, cluster.clock)

    finish(controller, cluster)

    assert state(store, R1).outcome is Outcome.SUCCEEDED
    assert [order.run_id for order in cluster.begun] == [R1]
    assert list(controller.damaged) == [R0]
    assert "not a record" in controller.damaged[R0]
    assert len(list(store.list(layout.run_log_prefix(R0)))) == 1
    shown = {row.run: row for row in read_rows(sweep, store)}
    assert shown[R0].status is Status.FAILED
    assert shown[R0].detail.startswith("its log is damaged: runs/cat-0-00000000/log/000000000000.json")
    assert shown[R1].status is Status.SUCCEEDED


def test_an_attempt_whose_log_is_damaged_is_stopped_and_its_slot_serves_another_run() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=2, max_steps=50)
    cluster = FakeCluster(store, sweep, nodes=1, commit_every=100)
    controller = Controller(sweep, store, cluster, cluster.clock)
    ticks(controller, cluster, 3)
    assert cluster.training(R0) == "n1/0"
    store.put(layout.log_entry(layout.run_log_prefix(R0), 2), b"{")

    ticks(controller, cluster, 20)
    assert cluster.training(R1) == "n1/0", "long before the damaged run would have ended"
    finish(controller, cluster)

    assert state(store, R1).outcome is Outcome.SUCCEEDED
    assert list(controller.damaged) == [R0]
    assert len(list(store.list(layout.run_log_prefix(R0)))) == 3, "nothing was appended"


def test_a_damaged_log_that_a_person_repairs_is_gone_on_with() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=2, max_steps=150)
    cluster = FakeCluster(store, sweep, nodes=1)
    key = layout.log_entry(layout.run_log_prefix(R0), 0)
    store.put(key, b"not a record")
    controller = Controller(sweep, store, cluster, cluster.clock)
    ticks(controller, cluster, 10)
    assert list(controller.damaged) == [R0]

    store.delete([key])
    finish(controller, cluster)

    assert_well_ended(store, sweep, cluster)


def test_what_a_person_has_pinned_is_not_retired() -> None:
    store, sweep = (
        MemoryStore(),
        small_sweep(runs=1, max_steps=9, checkpoint=Checkpoint(keep_last=1, grace_s=0.0)),
    )
    cluster = FakeCluster(store, sweep, commit_every=2)
    controller = Controller(sweep, store, cluster, cluster.clock)
    ticks(controller, cluster, 4)
    run_log(store, R0).append(Pinned(checkpoint=CheckpointRef(step=2, attempt=1), at=0.0))

    finish(controller, cluster)

    assert [c.step for c in state(store, R0).checkpoints] == [2, 9]


def test_agents_may_hand_their_records_to_the_controller_and_repeat_them() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=1, max_steps=20)
    cluster = FakeCluster(store, sweep, commit_every=100)
    controller = Controller(sweep, store, cluster, cluster.clock)
    ticks(controller, cluster, 3)
    running = state(store, R0).running
    assert running is not None
    commit = fake_commit(running.claimed, 3)

    controller.append(R0, commit)
    controller.append(R0, commit.model_copy(update={"at": 9.0}))

    assert told(store, R0) == ["claimed 1", "started", "committed 3"]


def test_a_ghosts_record_is_refused_by_the_controller() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=1, max_steps=20)
    cluster = FakeCluster(store, sweep)
    controller = Controller(sweep, store, cluster, cluster.clock)
    ticks(controller, cluster, 3)
    ghost = state(store, R0).attempts[0].claimed
    cluster.lose_node("n1")
    ticks(controller, cluster, 2)

    with pytest.raises(Fenced, match="attempt 2 is the newest, attempt 1 is fenced"):
        controller.append(R0, fake_commit(ghost, 19))


def test_a_record_for_an_unknown_run_is_refused() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=1)
    controller = Controller(sweep, store, FakeCluster(store, sweep), lambda: 0.0)

    with pytest.raises(Fenced, match="dog-0 is not a run of sweep cat"):
        controller.append("dog-0", Retired(checkpoints=(), at=0.0))


def test_a_flipped_byte_in_the_newest_checkpoint_costs_one_checkpoint() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=1, max_steps=12)
    cluster = FakeCluster(store, sweep)
    controller = Controller(sweep, store, cluster, cluster.clock)
    ticks(controller, cluster, 6)
    newest = state(store, R0).newest
    assert newest is not None
    key = layout.committed_file(R0, newest, FILE)
    store.put(key, bytes([store.get(key)[0] ^ 1]) + store.get(key)[1:])

    cluster.lose_node("n1")
    finish(controller, cluster)

    over = state(store, R0)
    assert over.outcome is Outcome.SUCCEEDED
    assert over.result is not None
    assert store.get(layout.committed_file(R0, over.result, FILE)) == weights_at(R0, 12)
    assert [r.checkpoint.step for r in records(store, R0) if isinstance(r, Quarantined)] == [newest.step]
    assert key not in stored_data(store, R0)


class Reporting:
    """A cluster one of whose runs is reported on by an agent that says anything."""

    def __init__(self, cluster: FakeCluster, run_id: str, **said: Any) -> None:
        self._cluster, self._run_id, self._said = cluster, run_id, said

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cluster, name)

    def observe(self) -> tuple[Slot, ...]:
        return tuple(
            replace(slot, work=replace(slot.work, exit_code=1, **self._said))
            if slot.work and slot.work.run_id == self._run_id
            else slot
            for slot in self._cluster.observe()
        )


@pytest.mark.parametrize(
    "said",
    [{"step_s": math.nan}, {"step_s": -1.0}, {"step": -1}, {"error": "x\ud800"}, {"error": "x" * 2_000_000}],
    ids=["not a number", "negative time", "negative step", "half a character", "long"],
)
def test_a_report_that_no_record_could_hold_ends_its_attempt_as_another_would(said: dict[str, Any]) -> None:
    store, sweep = MemoryStore(), small_sweep()
    cluster = FakeCluster(store, sweep)
    controller = Controller(sweep, store, Reporting(cluster, R0, **said), cluster.clock)
    finish(controller, cluster)
    assert controller.states[R0].outcome is Outcome.FAILED, told(store, R0)
    assert controller.states[R1].outcome is Outcome.SUCCEEDED, told(store, R1)


class Buggy(MemoryStore):
    """Raises, for one run, what no store should."""

    broken = ""

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        if self.broken and prefix.startswith(self.broken):
            raise ZeroDivisionError("a bug")
        return super().list(prefix, after)


def test_a_bug_that_one_run_meets_leaves_the_others_alone_and_is_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store, sweep = Buggy(), small_sweep(runs=3)
    store.broken = layout.run_prefix(R0)
    cluster = FakeCluster(store, sweep)
    controller = Controller(sweep, store, cluster, cluster.clock)
    ticks(controller, cluster, 40)
    assert [s.outcome for s in controller.states.values()] == [None, *[Outcome.SUCCEEDED] * 2]
    (line,) = [line for line in caplog.records if "a bug" in line.getMessage()]
    assert line.exc_info, "where it happened is told too"
    store.broken = ""
    finish(controller, cluster)
    assert_well_ended(store, sweep, cluster)


def test_time_in_which_nobody_listened_is_no_silence() -> None:
    now = 50.0
    listening = Listening(lambda: now, longest_s=2.0)
    for moment in (50.5, 51.0, 1051.0, 1051.5):
        now = moment
        listening.listen()

    assert listening.seconds == 0.5 + 0.5 + 2.0 + 0.5


def test_a_busy_or_unheard_slot_is_not_free() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=2)
    cluster = FakeCluster(store, sweep, nodes=2)
    cluster.silence("n1/0")
    controller = Controller(sweep, store, cluster, cluster.clock)
    ticks(controller, cluster, 2)

    assert [slot.health for slot in cluster.observe()] == [Health.UNKNOWN, Health.ALIVE]
    assert [state(store, run.run_id).attempt for run in sweep.runs] == [1, 0]
    assert cluster.begun == [Order(run_id=R0, attempt=1, incarnation=cluster.begun[0].incarnation)]


class Counting(MemoryStore):
    """Tells what was asked of it, without entries of logs that were read one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def take(self) -> list[str]:
        told, self.asked = sorted(self.asked), []
        return told

    def get(self, key: str) -> bytes:
        self.asked.append(f"get {key}")
        return super().get(key)

    def head(self, key: str) -> ObjectInfo | None:
        self.asked.append(f"head {key}")
        return super().head(key)

    def put(self, key: str, body: bytes | Path) -> None:
        self.asked.append(f"put {key}")
        super().put(key, body)

    def create(self, key: str, body: bytes) -> bool:
        self.asked.append(f"create {key}")
        return super().create(key, body)

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        self.asked.append(f"list {prefix}")
        return super().list(prefix, after)

    def delete(self, keys: Iterable[str]) -> None:
        doomed = tuple(keys)
        if doomed:
            self.asked.append(f"delete {len(doomed)}")
        super().delete(doomed)


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


def test_a_steady_tick_asks_the_store_for_nothing() -> None:
    store, sweep = Counting(), small_sweep(runs=6, max_steps=200)
    cluster = FakeCluster(store, sweep, nodes=3, commit_every=100)
    controller = Controller(sweep, store, cluster, cluster.clock)
    ticks(controller, cluster, 8)
    cluster.now += REFRESH_S
    controller.tick()
    store.take()

    controller.tick()
    assert store.take() == []

    cluster.now += REFRESH_S
    controller.tick()
    running = [run_id for run_id, known in controller.states.items() if known.running]
    assert len(running) == 3
    assert store.take() == sorted(f"list {layout.run_log_prefix(run_id)}" for run_id in running)


def test_checkpoints_that_wait_for_their_grace_cost_no_request() -> None:
    store, sweep = Counting(), small_sweep(runs=1, max_steps=200, checkpoint=Checkpoint(grace_s=300.0))
    cluster = FakeCluster(store, sweep)
    controller = Controller(sweep, store, cluster, cluster.clock)
    ticks(controller, cluster, 30)
    assert controller.states[R0].retired
    cluster.now += REFRESH_S
    controller.tick()
    store.take()
    controller.tick()
    assert store.take() == []


def test_very_many_runs_are_looked_at_less_often() -> None:
    runs = 150
    store, sweep = Counting(), small_sweep(runs=runs)
    cluster = FakeCluster(store, sweep, nodes=0)
    controller = Controller(sweep, store, cluster, cluster.clock)
    controller.tick()
    store.take()

    for _ in range(2 * runs):
        cluster.now += 1.0
        controller.tick()

    looks = [asked for asked in store.take() if layout.drains_prefix(sweep.name) not in asked]
    assert runs <= len(looks) <= 2.1 * runs, "each about once in 150 seconds"
    assert len(set(looks)) == runs, "none is forgotten"


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


def test_what_a_ghost_leaves_after_the_end_is_deleted_by_the_next_controller_and_looked_for_once() -> None:
    store, sweep = Counting(), small_sweep(runs=1, max_steps=20)
    cluster = FakeCluster(store, sweep)
    controller = Controller(sweep, store, cluster, cluster.clock)
    ticks(controller, cluster, 3)
    ghost = state(store, R0).attempts[0].claimed
    cluster.lose_node("n1")
    finish(controller, cluster)
    store.put(layout.checkpoint_file(R0, 1, ghost.incarnation, 9, FILE), b"late")

    finish(Controller(sweep, store, cluster, cluster.clock), cluster)

    assert len(stored_data(store, R0)) == len(state(store, R0).checkpoints)
    store.take()
    Controller(sweep, store, cluster, cluster.clock).tick()
    assert store.take() == [f"get {SNAPSHOT}", f"head {SNAPSHOT}"]


def test_a_long_log_gets_a_snapshot_of_its_own_that_its_next_attempt_starts_from() -> None:
    store, sweep = Counting(), small_sweep(runs=1, max_steps=3 * LONG, checkpoint=Checkpoint(keep_last=2))
    cluster = FakeCluster(store, sweep, commit_every=1)
    controller = Controller(sweep, store, cluster, cluster.clock)
    ticks(controller, cluster, LONG)
    wait_for(lambda: read_run(store, R0) is not None)
    snapshot = read_run(store, R0)
    assert snapshot is not None
    assert snapshot.next_seq >= LONG
    store.take()

    log = hinted_log(store, R0)
    assert log.refresh() == state(store, R0)
    assert len([asked for asked in store.take() if asked.startswith("get")]) < len(records(store, R0)) * 2


class Slow(MemoryStore):
    """Does not answer about one run until it is let."""

    def __init__(self, slow: str) -> None:
        super().__init__()
        self._slow = layout.run_prefix(slow)
        self.asked = threading.Event()
        self.answers = threading.Event()
        self.answers.set()

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        if prefix.startswith(self._slow) and threading.current_thread() is not threading.main_thread():
            if not self.answers.is_set():
                self.asked.set()
            self.answers.wait()
        return super().list(prefix, after)


def test_a_run_whose_part_of_the_store_hangs_holds_up_no_other() -> None:
    store, sweep = Slow(R0), small_sweep(runs=2, max_steps=30)
    cluster = FakeCluster(store, sweep, nodes=2)
    controller = Controller(sweep, store, cluster, cluster.clock)
    ticks(controller, cluster, 3)

    store.answers.clear()
    for _ in range(200):
        if state(store, R1).outcome:
            break
        ticks(controller, cluster, 1)
    assert store.asked.is_set()
    assert state(store, R1).outcome is Outcome.SUCCEEDED
    assert state(store, R0).outcome is None

    store.answers.set()
    wait_for(lambda: ticks(controller, cluster, 1) or controller.done)  # the thread that hung needs real time
    assert_well_ended(store, sweep, cluster)


def wait_for(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
