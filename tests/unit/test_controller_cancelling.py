"""Cancelling ends every run that is not over, and lets trainers save themselves."""

from functools import partial

import pytest
from support.fake_cluster import FakeCluster, small_sweep
from support.sweeps import R0, R1, Outage, finish, state, ticks, told, under_way

from orchestrator.commands.cancelling import ask_to_cancel
from orchestrator.control.controller import Controller
from storage import layout
from storage.errors import Unavailable
from storage.memory import MemoryStore
from storage.records import Outcome


def test_cancelling_lets_trainers_save_themselves_and_ends_every_run() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=3, max_steps=20)
    cluster, controller = under_way(store, sweep, 4, nodes=2, commit_every=10)

    controller.cancel([run.run_id for run in sweep.runs])
    finish(controller, cluster)

    assert [state(store, run.run_id).outcome for run in sweep.runs] == [Outcome.CANCELLED] * 3
    assert told(store, R0)[-3:] == ["committed 4", "ended 1 DRAINED", "finished CANCELLED"]
    assert state(store, sweep.runs[2].run_id).attempts == ()
    assert cluster.busy() == []


def test_cancelling_a_run_whose_node_is_lost_ends_it_and_brings_it_back_never() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=1, max_steps=20)
    cluster, controller = under_way(store, sweep, 4)

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
    cluster, controller = under_way(store, sweep, 0)
    finish(controller, cluster)
    before = told(store, R0)

    controller.cancel([R0])

    assert told(store, R0) == before


def test_a_cancel_that_somebody_else_wrote_into_the_log_is_obeyed() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=2, max_steps=400)
    cluster, controller = under_way(store, sweep, 4, nodes=1)

    other = Controller(sweep, store, FakeCluster(store, sweep, nodes=0), cluster.clock)
    other.cancel([R0, R1])
    ticks(controller, cluster, 70)

    assert state(store, R0).outcome is state(store, R1).outcome is Outcome.CANCELLED
