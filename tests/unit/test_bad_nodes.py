"""Nodes that fail their runs are left alone by the controller, on a cluster in virtual time."""

from collections.abc import Callable

import pytest
from support.fake_cluster import FakeCluster, small_sweep
from support.runs import claimed, lived

from orchestrator.control.cluster import Order
from orchestrator.control.controller import Controller
from orchestrator.control.reputation import PAUSE_S
from orchestrator.grid.schema import Recovery
from storage.log import run_log
from storage.memory import MemoryStore
from storage.object_store import ObjectStore
from storage.records import Claimed, Committed, Ended, EndReason, Outcome, Record
from storage.run_state import RunState
from trainer.errors import BaseUnavailable


def test_a_slot_that_can_try_nothing_keeps_no_other_of_its_node_from_trying() -> None:
    store = MemoryStore()
    sweep = small_sweep(runs=3, max_steps=20, recovery=Recovery(backoff_s=2.0, max_failures=5))
    cluster = FakeCluster(store, sweep, nodes=1, slots_per_node=2, commit_every=5)
    a, b, c = [run.run_id for run in sweep.runs]
    for run_id in (a, b):
        log = run_log(store, run_id)
        log.append(Claimed(attempt=1, incarnation="0" * 8, node="n1", slot="n1/0", at=cluster.now - 30))
        log.append(Ended(attempt=1, reason=EndReason.CUDA_ERROR, detail=run_id, step=0, at=cluster.now - 29))
    log = run_log(store, c)
    log.append(Claimed(attempt=1, incarnation="0" * 8, node="n9", slot="n9/0", at=cluster.now - 30))
    log.append(Committed(attempt=1, incarnation="0" * 8, step=5, files=(), at=cluster.now - 29))
    log.append(Ended(attempt=1, reason=EndReason.NODE_LOST, at=cluster.now - 28))
    cluster.unfit["n1/0"] = "its GPU cannot be used"
    controller = Controller(sweep, store, cluster, cluster.clock)

    for _ in range(int(PAUSE_S) + 10):
        controller.tick()
        if any(state.running for state in controller.states.values()):
            break
        cluster.advance()
    else:
        pytest.fail("nothing was ever tried on the only node")
    assert {note.slot: note.detail for note in controller.notes()}["n1/0"] == "its GPU cannot be used"


Fails = Callable[[str, str], bool]


def states(store: ObjectStore, ids: list[str]) -> dict[str, RunState]:
    return {run_id: run_log(store, run_id).refresh() for run_id in ids}


def run_with(
    fails: Fails, *, runs: int = 4, nodes: int = 2, restart_at: int | None = None
) -> tuple[dict[str, RunState], list[Record]]:
    """Run a sweep to its end, in which a trainer raises at once wherever ``fails`` says so."""
    store = MemoryStore()
    sweep = small_sweep(runs=runs, max_steps=30, recovery=Recovery(backoff_s=2.0, max_failures=4))
    cluster = FakeCluster(store, sweep, nodes=nodes, commit_every=5)
    controller = Controller(sweep, store, cluster, cluster.clock)
    for tick in range(2000):
        if tick == restart_at:
            controller = Controller(sweep, store, cluster, cluster.clock)
        controller.tick()
        if controller.done:
            break
        for slot in cluster.busy():
            work = next(s.work for s in cluster.observe() if s.slot == slot)
            if work and work.exit_code is None and fails(work.run_id, slot.partition("/")[0]):
                cluster.exit(slot, 1, f"RuntimeError: {work.run_id}")
        cluster.advance()
    assert controller.done
    ids = [run.run_id for run in sweep.runs]
    history: list[Record] = []
    for run_id in ids:
        log = run_log(store, run_id)
        log.refresh()
        history += [entry.record for entry in log.entries()]
    return states(store, ids), history


def failures_on(history: list[Record], node: str) -> int:
    count, current = 0, ""
    for record in history:
        if isinstance(record, Claimed):
            current = record.node
        if isinstance(record, Ended) and record.reason is EndReason.APP_ERROR and current == node:
            count += 1
    return count


@pytest.mark.parametrize("restart_at", [None, 30])
def test_a_bad_node_is_quarantined_and_every_run_of_the_sweep_ends_well(restart_at: int | None) -> None:
    over, history = run_with(lambda run_id, node: node == "n1", runs=6, restart_at=restart_at)

    assert {state.outcome for state in over.values()} == {Outcome.SUCCEEDED}
    assert failures_on(history, "n1") <= 3, "two that put it there, and one on probation"


def test_a_bad_run_fails_alone_and_says_on_which_nodes() -> None:
    bad = "cat-0-00000000"
    over, _ = run_with(lambda run_id, node: run_id == bad)

    outcomes = {run_id: state.outcome for run_id, state in over.items()}
    assert outcomes.pop(bad) is Outcome.FAILED
    assert set(outcomes.values()) == {Outcome.SUCCEEDED}
    assert over[bad].finished is not None
    assert "the same at step" in over[bad].finished.detail
    assert len(over[bad].attempts) == 2
    assert {len(state.attempts) for run_id, state in over.items() if run_id != bad} == {1}


def test_a_sweep_whose_runs_are_all_wrong_ends_without_any_quarantine() -> None:
    over, _ = run_with(lambda run_id, node: True)

    assert {state.outcome for state in over.values()} == {Outcome.FAILED}


def test_a_controller_that_starts_knows_the_bad_nodes_before_it_judges_an_end() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=3, max_steps=60, recovery=Recovery(max_failures=5))
    cluster = FakeCluster(store, sweep, nodes=2)
    unlucky, *others = (run.run_id for run in sweep.runs)

    def failed(attempt: int, error: str) -> Ended:
        detail = f"the trainer exited with code 1: {error}"
        now, reason = cluster.now, EndReason.APP_ERROR
        return Ended(attempt=attempt, reason=reason, detail=detail, step=1, exit_code=1, at=now)

    for run_id in others:
        lived(store, run_id, claimed(1, node="n1"), failed(1, run_id))
    lived(store, unlucky, claimed(1, node="n2"), failed(1, "boom"), claimed(2, node="n1"))
    cluster.start("n1/0", Order(run_id=unlucky, attempt=2, incarnation="00000002"))
    cluster.advance()  # it makes a step
    cluster.exit("n1/0", 1, "boom")

    controller = Controller(sweep, store, cluster, cluster.clock)
    controller.tick()

    state = controller.states[unlucky]
    assert [a.ended.reason for a in state.attempts if a.ended] == [EndReason.APP_ERROR] * 2
    assert state.finished is None


def test_a_hub_that_does_not_answer_for_minutes_fails_no_run_and_speaks_against_no_node() -> None:
    away_until = 1000.0 + 180.0
    store, sweep = MemoryStore(), small_sweep(runs=4, max_steps=20, recovery=Recovery())
    cluster = FakeCluster(store, sweep, nodes=4)
    controller = Controller(sweep, store, cluster, cluster.clock)
    for _ in range(1000):
        controller.tick()
        if controller.done:
            break
        for slot in cluster.busy() if cluster.now < away_until else ():
            error = BaseUnavailable("base model owner/model: the hub did not answer")
            cluster.exit(slot, error.exit_code, f"BaseUnavailable: {error}")
        cluster.advance()

    over = states(store, [run.run_id for run in sweep.runs])
    ends = [a.ended.reason for state in over.values() for a in state.attempts if a.ended]
    assert {state.outcome for state in over.values()} == {Outcome.SUCCEEDED}
    assert set(ends) == {EndReason.HUB_DOWN}
    assert len(ends) < 4 * 10, "it was asked again and again without a pause"


def test_the_only_node_is_used_whatever_happens_there() -> None:
    failed: set[str] = set()

    def once(run_id: str, node: str) -> bool:
        first = run_id not in failed
        failed.add(run_id)
        return first

    over, _ = run_with(once, nodes=1)

    assert {state.outcome for state in over.values()} == {Outcome.SUCCEEDED}


def test_a_run_that_failed_on_a_bad_node_and_then_once_on_a_good_one_is_tried_again() -> None:
    """The same error at the same step on two nodes: but one of them fails everybody."""
    unlucky, failed = "cat-0-00000000", list[str]()

    def fails(run_id: str, node: str) -> bool:
        if node == "n2" and run_id == unlucky and not failed:
            failed.append(node)
            return True
        return node == "n1"

    over, _ = run_with(fails)

    assert failed == ["n2"]
    assert {state.outcome for state in over.values()} == {Outcome.SUCCEEDED}
