"""Hundreds of random histories of a sweep keep what is promised; of a controller that is wrong, some do not.

``make simulate`` plays a hundred thousand.
"""

import pytest
from proof.control import play
from support.fake_cluster import small_sweep
from support.runs import claimed, committed

from orchestrator.control.cluster import Slot
from orchestrator.control.lifecycle import CancelAsked, Lost, Policy, advance
from orchestrator.control.loss import loss
from orchestrator.control.pruning import delete_orphans, prune
from orchestrator.control.steering import Steering
from orchestrator.control.tracked_run import TrackedRun
from storage.ledger import append_decided, append_until_said
from storage.log import run_log
from storage.memory import MemoryStore
from storage.records import EndReason, Finished, Outcome, Record, Retired
from storage.run_state import RunState

SCHEDULES = 300
ENOUGH = 3000
"""A wrong controller is found out within so many schedules."""


def test_random_histories_of_a_sweep_violate_nothing() -> None:
    failed = [verdict for seed in range(SCHEDULES) if (verdict := play(seed)).violations]

    assert not failed, f"make simulate N=1 SEED={failed[0].seed}: {failed[0].violations}"


def test_a_seed_is_one_history() -> None:
    def told(seed: int) -> list[str]:
        """What happened, without the random parts of keys and entries."""
        return [line[:40] for line in play(seed, record=True).history]

    for seed in range(20, 30):
        assert told(seed) == told(seed)


def test_who_loses_a_race_for_a_part_of_what_is_retired_leaves_the_rest_to_its_next_tick() -> None:
    """Seed 600473: of three checkpoints a controller had reaped two when its successor wanted to reap all."""
    store, sweep = MemoryStore(), small_sweep(runs=1)
    run = TrackedRun.of(sweep.runs[0], store, many=False)
    last = committed(20, final=True)
    for record in (claimed(), committed(10), last, Finished(outcome=Outcome.SUCCEEDED, step=20, at=2.0)):
        run.log.append(record)
    run.log.append(Retired(checkpoints=(committed(10).ref,), at=3.0))

    delete_orphans(run, 0.0)
    assert not run.tidy

    prune(run, sweep, 0.0)
    delete_orphans(run, 0.0)
    assert run.tidy
    assert run.state.retired == ()


def test_a_log_that_fences_nobody_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.run_state._refuse_attempt", lambda state, attempt: None)

    assert any(play(seed).violations for seed in range(ENOUGH))


def test_a_controller_that_does_not_repeat_lost_orders_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Steering, "steer", lambda *_: None)

    assert any("does not end" in line for seed in range(ENOUGH) for line in play(seed).violations)


def test_a_controller_that_takes_silence_for_death_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def at_once(slot: Slot, silent_s: float, limit_s: float, **how: bool) -> tuple[EndReason, str] | None:
        return loss(slot, 1e9, 0.0, **how)

    monkeypatch.setattr("orchestrator.control.news.loss", at_once)

    assert any("instead of 1" in line for seed in range(ENOUGH) for line in play(seed).violations)


def test_what_was_decided_is_not_appended_once_somebody_else_came_between() -> None:
    """Seed 72788: a controller that was behind ended an attempt, and the run, after its final commit."""
    store = MemoryStore()
    log, other = run_log(store, "run"), run_log(store, "run")
    other.append(claimed())
    lost = Lost(at=1.0, attempt=1, reason=EndReason.STALLED, detail="")
    decided = advance(log.refresh(), lost, Policy(max_failures=1))
    other.append(committed(10, final=True))

    appended = list(append_decided(log, decided))

    assert [record.kind for record in decided] == ["ended", "finished"]
    assert appended == []
    assert log.state.result
    assert log.state.running
    assert list(append_decided(log, decided[:1])) == [decided[0]]  # on what is known now it may


def test_a_person_who_cancels_is_heard_though_somebody_else_came_between() -> None:
    store = MemoryStore()
    log, other = run_log(store, "run"), run_log(store, "run")
    asked, looks = CancelAsked(at=1.0), 0

    def decide(state: RunState) -> tuple[Record, ...]:
        nonlocal looks
        looks += 1
        decided = advance(state, asked, Policy())
        if looks == 1:
            other.append(claimed())
        return decided

    said = list(append_until_said(log, decide))

    assert [record.kind for record in said] == ["cancel_requested"]  # an attempt holds it
    assert log.state.cancel_requested
    assert log.state.running
