"""When a run that fails again and again is over, and how long it waits before it is tried again."""

from functools import reduce

import pytest
from support.lifecycle import NOW, POLICY, end, ended, exited, finished
from support.runs import claimed, committed, ref, state_after

from orchestrator.control.lifecycle import Lost, Policy, advance, wait_s
from storage.records import EndReason, Finished, Outcome, Quarantined, Record
from storage.run_state import WITNESSES, RunState, apply


def test_the_only_checkpoint_takes_more_than_one_nodes_word() -> None:
    """A sick disk or memory must not cost the run all that it has."""
    state = state_after(claimed(), committed(10), end(1), claimed(2, node="sick"))
    once = reduce(apply, advance(state, exited(65, attempt=2), POLICY), state)
    assert once.newest == committed(10)

    again = apply(once, claimed(3, node="other"))
    twice = reduce(apply, advance(again, exited(65, attempt=3), POLICY), again)
    assert (twice.newest, twice.finished) == (None, None)


def test_where_there_is_one_node_the_run_begins_anew_after_three_attempts() -> None:
    state = state_after(claimed(), committed(10), end(1))
    for attempt in range(2, 2 + WITNESSES):
        assert state.newest == committed(10)
        state = apply(state, claimed(attempt))
        state = reduce(apply, advance(state, exited(65, attempt=attempt), POLICY), state)

    assert (state.newest, state.finished) == (None, None)
    state = apply(state, claimed(state.attempt + 1))
    last = advance(state, exited(1, attempt=state.attempt), POLICY)[-1]
    assert isinstance(last, Finished), "it had its last chance"


def test_an_attempt_speaks_against_one_checkpoint_only() -> None:
    """Its fetch has set one aside, its trainer cannot use the next: that is more likely the node."""
    said = Quarantined(checkpoint=ref(20), attempt=2, reason="sha256", at=5.0)
    state = state_after(claimed(), committed(10), committed(20), end(1), claimed(2), said)

    records = advance(state, exited(65, attempt=2), POLICY)

    assert records == (ended(EndReason.CKPT_INVALID, 65, "the trainer exited with code 65", attempt=2),)
    assert reduce(apply, records, state).newest == committed(10)


def test_a_step_whose_checkpoint_is_refused_again_and_again_fails_the_run() -> None:
    """Otherwise a trainer that cannot read what it writes would train the same steps for ever."""
    state = state_after(claimed(), committed(10), end(1))
    while not state.finished:
        assert state.attempt < 20
        for node in ("n1", "n2"):
            state = apply(state, claimed(state.attempt + 1, node=node))
            state = reduce(apply, advance(state, exited(65, attempt=state.attempt), POLICY), state)
        if not state.finished:
            n = state.attempt + 1
            state = reduce(apply, (claimed(n), committed(10, n), end(n)), state)

    assert len(state.quarantined) == POLICY.max_failures
    assert state.finished.detail == (
        "the trainer exited with code 65; the checkpoint of step 10 was refused 3 times (step 0)"
    )


def test_the_same_error_on_one_node_alone_fails_no_run_before_its_failures_are_spent() -> None:
    """It may be the node: one that fails whatever it gets may be the only free one."""
    state, attempts = state_after(claimed(), committed(10), end(1, EndReason.NODE_LOST)), 1
    while not state.finished:
        attempts += 1
        state = apply(state, claimed(attempts, node="bad"))
        event = exited(1, attempt=attempts, error="ValueError: no", step=12)
        state = reduce(apply, advance(state, event, POLICY), state)

    assert attempts == 1 + POLICY.max_failures
    detail = "the trainer exited with code 1: ValueError: no"
    assert state.finished.detail == f"{detail}; no new checkpoint in 3 attempts (step 10)"


def test_a_lost_node_between_two_equal_errors_does_not_hide_that_they_are_equal() -> None:
    detail = "the trainer exited with code 1: ValueError: no"
    lost = (claimed(2), end(2, EndReason.NODE_LOST))
    state = state_after(claimed(), end(1, detail=detail), *lost, claimed(3, node="n2"))

    *_, last = advance(state, exited(1, attempt=3, error="ValueError: no"), POLICY)

    assert last == finished(Outcome.FAILED, detail=f"{detail}; the same at step 0 on n1 and n2 (step 0)")


@pytest.mark.parametrize(
    "between",
    [
        pytest.param((committed(10, 2), end(2, EndReason.NODE_LOST)), id="progress"),
        pytest.param((end(2, detail="another error"),), id="another error"),
        pytest.param((end(2, EndReason.KILLED),), id="a kill"),
    ],
)
def test_the_same_error_with_something_else_between_is_tried_again(between: tuple[Record, ...]) -> None:
    detail = "the trainer exited with code 1: ValueError: no"
    state = state_after(claimed(), end(1, detail=detail), claimed(2), *between, claimed(3))

    records = advance(state, exited(1, attempt=3, error="ValueError: no"), Policy(max_failures=9))

    assert [record.kind for record in records] == ["ended"]


@pytest.mark.parametrize("max_failures", [1, 2, 4])
def test_max_failures_stalls_in_a_row_fail_the_run(max_failures: int) -> None:
    policy, state, records = Policy(max_failures=max_failures), RunState(), ()
    for attempt in range(1, max_failures + 1):
        assert state.finished is None
        state = apply(state, claimed(attempt))
        records = advance(state, exited(1, attempt=attempt, error=f"error {attempt}", step=7), policy)
        state = reduce(apply, records, state)

    detail = f"the trainer exited with code 1: error {max_failures}"
    why = f"no new checkpoint in {max_failures} attempt{'' if max_failures == 1 else 's'}"
    assert records[-1] == finished(Outcome.FAILED, 7, f"{detail}; {why} (step 0)")


def test_kills_without_progress_count_as_stalls_though_they_are_equal() -> None:
    state, attempts = RunState(), 0
    while not state.finished:
        attempts += 1
        state = apply(state, claimed(attempts))
        state = reduce(apply, advance(state, exited(-9, attempt=attempts), POLICY), state)

    assert attempts == POLICY.max_failures


def test_progress_forgives_the_stalls_before_it() -> None:
    state = state_after(
        claimed(), end(1, detail="a"), claimed(2), end(2, detail="b"), claimed(3), committed(10, 3)
    )

    records = advance(state, exited(1, attempt=3, error="c"), POLICY)

    assert [record.kind for record in records] == ["ended"]
    assert reduce(apply, records, state).stalls == 0


@pytest.mark.parametrize(
    ("stalls", "expected_s"), [(0, 0.0), (1, 5.0), (2, 10.0), (3, 20.0), (4, 40.0), (5, 60.0), (3000, 60.0)]
)
def test_the_wait_after_a_stall_doubles_up_to_its_limit(stalls: int, expected_s: float) -> None:
    history = [r for n in range(1, min(stalls, 9) + 1) for r in (claimed(n), end(n, detail=str(n)))]
    state = state_after(*history)
    if stalls > 9:
        state = RunState(attempts=state.attempts, stalls=stalls, fruitless=stalls)

    assert wait_s(state, POLICY) == expected_s


def test_a_preemption_after_a_stall_is_followed_at_once() -> None:
    """The wait for the stall was over before the attempt that was preempted."""
    state = state_after(claimed(), end(1), claimed(2), end(2, EndReason.NODE_LOST))

    assert (state.stalls, wait_s(state, POLICY)) == (1, 0.0)


@pytest.mark.parametrize("reason", [EndReason.NODE_LOST, EndReason.STORAGE_DOWN, EndReason.DRAINED])
def test_preemptions_without_any_progress_wait_from_the_third_on(reason: EndReason) -> None:
    """Or nodes without credentials for the store would launch a run again and again, as fast as they can."""
    state, waits = RunState(), []
    for attempt in range(1, 9):
        state = reduce(apply, (claimed(attempt), end(attempt, reason)), state)
        waits.append(wait_s(state, POLICY))
    assert waits == [0.0, 0.0, 5.0, 10.0, 20.0, 40.0, 60.0, 60.0]
    assert state.stalls == 0

    state = reduce(apply, (claimed(9), committed(10, 9), end(9, reason)), state)
    assert wait_s(state, POLICY) == 0.0


def test_a_run_that_takes_its_agent_down_again_and_again_fails() -> None:
    state, attempts = RunState(), 0
    while not state.finished:
        attempts += 1
        state = apply(state, claimed(attempts))
        lost = Lost(at=NOW, attempt=attempts, reason=EndReason.AGENT_LOST, detail="the agent on n1 died")
        state = reduce(apply, advance(state, lost, POLICY), state)
        assert attempts > 2 or wait_s(state, POLICY) == 0.0, "it may have been the node"

    assert attempts == POLICY.max_failures
    assert state.finished.detail == "the agent on n1 died; no new checkpoint in 3 attempts (step 0)"
