"""What an event adds to a run's log: tables of single events, and promises over arbitrary histories."""

import signal
from dataclasses import dataclass
from functools import reduce

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.runs import claimed, committed, ref

from orchestrator.control.lifecycle import (
    CancelAsked,
    Event,
    Exited,
    Lost,
    Phase,
    Policy,
    advance,
    phase,
    settle,
    wait_s,
)
from storage.records import (
    CancelRequested,
    Ended,
    EndReason,
    Finished,
    Outcome,
    Quarantined,
    Record,
    Started,
)
from storage.run_state import WITNESSES, RunState, apply, refusal

POLICY = Policy(max_failures=3, backoff_s=5.0, max_backoff_s=60.0)
NOW = 100.0


def state_after(*records: Record) -> RunState:
    state = RunState()
    for record in records:
        assert refusal(state, record) is None, f"the history is impossible: {refusal(state, record)}"
        state = apply(state, record)
    return state


def end(attempt: int, reason: EndReason = EndReason.APP_ERROR, detail: str = "boom") -> Ended:
    return Ended(attempt=attempt, reason=reason, detail=detail, exit_code=1, at=50.0)


def exited(code: int, attempt: int = 1, error: str = "", step: int = 0) -> Exited:
    return Exited(at=NOW, attempt=attempt, code=code, error=error, step=step, step_s=0.5)


def finished(outcome: Outcome, step: int = 0, detail: str = "") -> Finished:
    return Finished(outcome=outcome, step=step, detail=detail, at=NOW)


def ended(reason: EndReason, code: int, detail: str, *, attempt: int = 1, step: int = 0) -> Ended:
    return Ended(attempt=attempt, reason=reason, detail=detail, step=step, exit_code=code, step_s=0.5, at=NOW)


CLAIMED = state_after(claimed())
TRAINING = state_after(claimed(), Started(attempt=1, step=0, at=2.0), committed(10))
COMPLETE = state_after(claimed(), committed(10), committed(20, final=True))
CANCELLING = state_after(claimed(), committed(10), CancelRequested(at=5.0))


@pytest.mark.parametrize(
    ("state", "phase_now"),
    [
        (RunState(), Phase.QUEUED),
        (CLAIMED, Phase.RUNNING),
        (CANCELLING, Phase.RUNNING),
        (state_after(claimed(), end(1)), Phase.QUEUED),
        (state_after(claimed(), finished(Outcome.FAILED)), Phase.FINISHED),
    ],
)
def test_the_phase_follows_from_the_log(state: RunState, phase_now: Phase) -> None:
    assert phase(state) is phase_now


@pytest.mark.parametrize(
    ("code", "reason", "detail"),
    [
        (75, EndReason.DRAINED, "the trainer was asked to stop and saved its state"),
        (-9, EndReason.KILLED, "the trainer was killed by SIGKILL"),
        (-11, EndReason.KILLED, "the trainer was killed by SIGSEGV"),
        (-(signal.SIGRTMIN + 3), EndReason.KILLED, f"the trainer was killed by signal {signal.SIGRTMIN + 3}"),
        (1, EndReason.APP_ERROR, "the trainer exited with code 1: ValueError: no"),
        (0, EndReason.APP_ERROR, "the trainer exited with code 0 but no final checkpoint was committed"),
    ],
)
def test_an_exit_ends_the_attempt_and_leaves_the_run_queued(
    code: int, reason: EndReason, detail: str
) -> None:
    error = "ValueError: no" if code == 1 else ""

    records = advance(TRAINING, exited(code, error=error, step=14), POLICY)

    assert records == (ended(reason, code, detail, step=14),)
    assert phase(reduce(apply, records, TRAINING)) is Phase.QUEUED


def test_an_exit_without_a_message_says_the_code_alone() -> None:
    (record,) = advance(TRAINING, exited(3), POLICY)

    assert record == ended(EndReason.APP_ERROR, 3, "the trainer exited with code 3")


def test_exit_0_without_a_final_checkpoint_says_why_it_is_not_there() -> None:
    (record,) = advance(TRAINING, exited(0, error="Corrupt: step-000000020: sha256"), POLICY)

    said = "the trainer exited with code 0 but no final checkpoint was committed"
    assert record == ended(EndReason.APP_ERROR, 0, f"{said}: Corrupt: step-000000020: sha256")


def test_exit_0_with_the_final_checkpoint_committed_is_success() -> None:
    assert advance(COMPLETE, exited(0, step=20), POLICY) == (finished(Outcome.SUCCEEDED, 20),)


@pytest.mark.parametrize("code", [1, 75, 78, -9])
def test_a_committed_result_is_success_however_the_trainer_ended(code: int) -> None:
    *_, last = advance(COMPLETE, exited(code, step=20), POLICY)

    assert last == finished(Outcome.SUCCEEDED, 20)


def test_a_lost_node_after_the_final_commit_is_success() -> None:
    lost = Lost(at=NOW, attempt=1, reason=EndReason.NODE_LOST, detail="n1 was lost", step=20)

    assert advance(COMPLETE, lost, POLICY)[-1] == finished(Outcome.SUCCEEDED, 20)


def test_a_refused_configuration_fails_the_run_at_once() -> None:
    said = "BadInput: no images (give a folder)"

    assert advance(CLAIMED, exited(78, error=said), POLICY) == (finished(Outcome.FAILED, detail=said),)
    assert advance(CLAIMED, exited(78), POLICY) == (
        finished(Outcome.FAILED, detail="the trainer refused its configuration"),
    )


def test_a_lost_node_queues_the_run_at_once_and_says_what_was_known() -> None:
    lost = Lost(
        at=NOW,
        attempt=1,
        reason=EndReason.NODE_LOST,
        detail="n1 was lost",
        step=14,
        step_s=0.5,
        silent_s=3.0,
    )

    records = advance(TRAINING, lost, POLICY)

    assert records == (
        Ended(
            attempt=1,
            reason=EndReason.NODE_LOST,
            detail="n1 was lost",
            step=14,
            silent_s=3.0,
            step_s=0.5,
            at=NOW,
        ),
    )
    after = reduce(apply, records, TRAINING)
    assert (phase(after), after.stalls, wait_s(after, POLICY)) == (Phase.QUEUED, 0, 0.0)


def test_exit_65_sets_aside_what_was_resumed_from() -> None:
    state = state_after(claimed(), committed(10), committed(20), end(1), claimed(2))

    records = advance(state, exited(65, attempt=2, error="BadCheckpoint: torn"), POLICY)

    detail = "the trainer exited with code 65: BadCheckpoint: torn"
    assert records == (
        Quarantined(checkpoint=ref(20), attempt=2, reason=detail, at=NOW),
        ended(EndReason.CKPT_INVALID, 65, detail, attempt=2),
    )
    assert reduce(apply, records, state).newest == committed(10)


def test_exit_65_after_progress_sets_nothing_aside() -> None:
    state = state_after(claimed(), committed(10), end(1), claimed(2), committed(20, 2))

    records = advance(state, exited(65, attempt=2), POLICY)

    assert records == (ended(EndReason.CKPT_INVALID, 65, "the trainer exited with code 65", attempt=2),)


def test_exit_65_without_any_checkpoint_is_a_stall() -> None:
    records = advance(CLAIMED, exited(65), POLICY)

    assert records == (ended(EndReason.CKPT_INVALID, 65, "the trainer exited with code 65"),)
    assert reduce(apply, records, CLAIMED).stalls == 1


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


def test_cancelling_a_queued_run_ends_it() -> None:
    for state in (RunState(), state_after(claimed(), committed(10), end(1))):
        records = advance(state, CancelAsked(at=NOW), POLICY)

        step = state.committed_step
        assert records == (CancelRequested(at=NOW), finished(Outcome.CANCELLED, step))


def test_cancelling_a_running_run_waits_for_its_attempt_to_end() -> None:
    assert advance(TRAINING, CancelAsked(at=NOW), POLICY) == (CancelRequested(at=NOW),)
    assert advance(CANCELLING, CancelAsked(at=NOW), POLICY) == ()


@pytest.mark.parametrize("code", [75, 1, 0, 65, 78, -9])
def test_a_run_that_is_being_cancelled_ends_cancelled_however_its_attempt_ends(code: int) -> None:
    *_, last = advance(CANCELLING, exited(code, step=14), POLICY)

    assert (last.kind, last) == ("finished", finished(Outcome.CANCELLED, last.step))  # type: ignore[union-attr]


def test_a_run_that_is_being_cancelled_and_whose_node_is_lost_ends_cancelled() -> None:
    lost = Lost(at=NOW, attempt=1, reason=EndReason.NODE_LOST, detail="n1 was lost", step=14)

    assert advance(CANCELLING, lost, POLICY)[-1] == finished(Outcome.CANCELLED, 10)


def test_a_run_that_completed_while_it_was_being_cancelled_has_succeeded() -> None:
    state = apply(CANCELLING, committed(20, final=True))

    assert advance(state, exited(0, step=20), POLICY) == (finished(Outcome.SUCCEEDED, 20),)


def test_cancelling_a_complete_run_that_lost_its_node_is_too_late() -> None:
    state = apply(COMPLETE, end(1, EndReason.NODE_LOST))

    assert advance(state, CancelAsked(at=NOW), POLICY)[-1] == finished(Outcome.SUCCEEDED, 20)


@pytest.mark.parametrize(
    "event",
    [
        exited(1, attempt=1),
        exited(78, attempt=1),
        exited(0, attempt=3),
        Lost(at=NOW, attempt=1, reason=EndReason.NODE_LOST, detail="n1 was lost"),
    ],
)
def test_an_event_of_another_attempt_is_ignored(event: Event) -> None:
    state = state_after(claimed(), end(1, EndReason.NODE_LOST), claimed(2))

    assert advance(state, event, POLICY) == ()


@pytest.mark.parametrize(
    "event",
    [
        exited(1),
        exited(0),
        CancelAsked(at=NOW),
        Lost(at=NOW, attempt=1, reason=EndReason.NODE_LOST, detail=""),
    ],
)
def test_nothing_happens_to_a_run_that_is_over(event: Event) -> None:
    state = apply(COMPLETE, finished(Outcome.SUCCEEDED, 20))

    assert advance(state, event, POLICY) == ()
    assert settle(state, NOW) == ()


def test_an_exit_that_was_recorded_is_not_recorded_again() -> None:
    assert advance(state_after(claimed(), end(1)), exited(1), POLICY) == ()


@pytest.mark.parametrize(
    ("state", "due"),
    [
        (RunState(), ()),
        (CLAIMED, ()),
        (COMPLETE, ()),
        (apply(COMPLETE, end(1)), (finished(Outcome.SUCCEEDED, 20),)),
        (apply(CANCELLING, end(1)), (finished(Outcome.CANCELLED, 10),)),
    ],
)
def test_what_is_due_on_a_run_that_no_attempt_holds(state: RunState, due: tuple[Record, ...]) -> None:
    assert settle(state, NOW) == due


@dataclass(frozen=True)
class Move:
    """One thing that happens to a run, chosen without knowing its state."""

    what: str
    n: int
    attempt_off: int


MOVES = st.builds(
    Move,
    st.sampled_from(["claim", "claim", "commit", "final", "exit", "refuse", "lose", "cancel", "settle"]),
    st.integers(0, 5),
    st.sampled_from([0, 0, 0, 0, -1, 1]),
)
EXITS = (1, 0, 75, -9, 65, 78)
LOSSES = (EndReason.NODE_LOST, EndReason.NODE_UNREACHABLE, EndReason.AGENT_LOST)


def step_on(state: RunState, move: Move) -> tuple[Record, ...]:
    """What is appended: by an agent, whatever the state, or by the controller, as ``advance`` says."""
    attempt = max(1, state.attempt + move.attempt_off)
    match move.what:
        case "claim":
            return (claimed(attempt + 1),)
        case "commit" | "final":
            return (committed(state.committed_step + move.n, attempt, final=move.what == "final"),)
        case "exit":
            error = f"error {move.n % 2}"
            return advance(state, exited(EXITS[move.n], attempt=attempt, error=error), POLICY)
        case "refuse":
            return advance(state, exited(65, attempt=attempt), POLICY)
        case "lose":
            reason = LOSSES[move.n % 3]
            return advance(state, Lost(at=NOW, attempt=attempt, reason=reason, detail="gone"), POLICY)
        case "cancel":
            return advance(state, CancelAsked(at=NOW), POLICY) if move.n == 0 else ()
        case _:
            return settle(state, NOW)


@given(st.lists(MOVES, max_size=50))
@settings(max_examples=300)
def test_any_history_keeps_its_promises(moves: list[Move]) -> None:
    state = state_after(claimed())
    for move in moves:
        records = step_on(state, move)
        by_controller = move.what not in ("claim", "commit", "final")
        before, results = state, state.finished
        for record in records:
            refused = refusal(state, record)
            assert not (by_controller and refused), f"the controller wrote what the log refuses: {refused}"
            if refused is None:
                state = apply(state, record)

        assert results is None or state.finished == results, "a second result"
        if state.finished and before.finished is None:
            check_result(before, state, move)
        if phase(state) is Phase.QUEUED and by_controller and records:
            assert state.result is None, "a complete run was queued again"
            assert not state.cancel_requested, "a cancelled run was queued again"
            assert state.stalls < POLICY.max_failures, "a run that stalled too often was queued again"


def check_result(before: RunState, after: RunState, move: Move) -> None:
    assert after.finished is not None
    outcome = after.finished.outcome
    assert (outcome is Outcome.SUCCEEDED) == (before.result is not None), "success is a committed result"
    if outcome is Outcome.FAILED:
        agent_lost = move.what == "lose" and LOSSES[move.n % 3] is EndReason.AGENT_LOST
        assert move.what in ("exit", "refuse") or agent_lost, "a lost node, or a person, failed the run"
        assert move.what != "exit" or EXITS[move.n] != 75, "a preemption failed the run"
    if outcome is Outcome.CANCELLED:
        assert after.cancel_requested


def test_the_histories_above_reach_every_outcome() -> None:
    """Guards the test above against histories in which nothing ever happens."""
    seen: set[str] = set()

    @settings(database=None, derandomize=True, max_examples=300)
    @given(st.lists(MOVES, max_size=50))
    def explore(moves: list[Move]) -> None:
        state = state_after(claimed())
        for move in moves:
            for record in step_on(state, move):
                if refusal(state, record) is None:
                    state = apply(state, record)
                    seen.add(record.kind)
        seen.add(str(state.outcome))

    explore()
    assert seen >= {"SUCCEEDED", "FAILED", "CANCELLED", "quarantined", "ended", "cancel_requested"}


@given(st.lists(st.sampled_from(["lose", "drain", "commit"]), max_size=40))
def test_preemptions_alone_never_fail_a_run_and_make_it_wait_only_without_progress(kinds: list[str]) -> None:
    state = RunState()
    for kind in kinds:
        if state.running is None:
            state = apply(state, claimed(state.attempt + 1))
        attempt = state.attempt
        match kind:
            case "lose":
                event: Event = Lost(at=NOW, attempt=attempt, reason=EndReason.NODE_LOST, detail="gone")
                state = reduce(apply, advance(state, event, Policy(max_failures=1)), state)
            case "drain":
                state = reduce(apply, advance(state, exited(75, attempt=attempt), POLICY), state)
            case _:
                state = apply(state, committed(state.committed_step + 1, attempt))

        assert state.finished is None
        assert state.stalls == 0
        assert (wait_s(state, POLICY) == 0.0) == (state.running is not None or state.fruitless <= 2)
