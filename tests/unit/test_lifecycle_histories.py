"""Promises about the life of a run over arbitrary histories."""

from dataclasses import dataclass
from functools import reduce

from hypothesis import given, settings
from hypothesis import strategies as st
from support.lifecycle import NOW, POLICY, exited
from support.runs import claimed, committed, state_after

from orchestrator.control.lifecycle import (
    CancelAsked,
    Event,
    Lost,
    Phase,
    Policy,
    advance,
    phase,
    settle,
    wait_s,
)
from storage.records import EndReason, Outcome, Record
from storage.run_state import RunState, apply, refusal


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
