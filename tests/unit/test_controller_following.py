"""What the controller makes of what it is told: by agents, by logs that are damaged, by clocks."""

import math
from dataclasses import replace
from typing import Any

import pytest
from support.fake_cluster import FakeCluster, small_sweep
from support.sweeps import (
    R0,
    R1,
    Outage,
    assert_well_ended,
    fake_commit,
    finish,
    state,
    ticks,
    told,
    under_way,
)

from orchestrator.control.cluster import Slot
from orchestrator.control.controller import Controller
from orchestrator.reports.view import Status, read_rows
from storage import layout
from storage.errors import Fenced
from storage.log import run_log
from storage.memory import MemoryStore
from storage.records import Claimed, Ended, EndReason, Outcome, Retired


def test_agents_may_hand_their_records_to_the_controller_and_repeat_them() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=1, max_steps=20)
    _, controller = under_way(store, sweep, 3, commit_every=100)
    running = state(store, R0).running
    assert running is not None
    commit = fake_commit(running.claimed, 3)

    controller.append(R0, commit)
    controller.append(R0, commit.model_copy(update={"at": 9.0}))

    assert told(store, R0) == ["claimed 1", "started", "committed 3"]


def test_a_ghosts_record_is_refused_by_the_controller() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=1, max_steps=20)
    cluster, controller = under_way(store, sweep, 3)
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
    cluster, controller = under_way(store, sweep, 3, nodes=1, commit_every=100)
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
