"""Promises of the pure decisions over whatever may happen: who is to blame, what recurs, who comes next."""

from functools import reduce

from hypothesis import example, given
from hypothesis import strategies as st
from support.runs import claimed, committed

from orchestrator.control.lifecycle import CancelAsked, Event, Exited, Lost, Policy, advance, settle, wait_s
from orchestrator.control.scheduler import Avoided, FreeSlot, QueuedRun, assign
from storage.records import EndReason, Record
from storage.run_state import FREE_ENDS, RunState, apply, refusal
from trainer.rundir import (
    EXIT_BAD_CHECKPOINT,
    EXIT_COMPLETE,
    EXIT_DISK_FULL,
    EXIT_HUB_UNREACHABLE,
    EXIT_PREEMPTED,
    EXIT_STORE_UNREACHABLE,
    EXIT_UNFIT,
)

NOW = 100.0
FREE_EXITS = (EXIT_PREEMPTED, EXIT_HUB_UNREACHABLE, EXIT_STORE_UNREACHABLE, EXIT_UNFIT)
EXITS = (EXIT_COMPLETE, 1, -9, EXIT_BAD_CHECKPOINT, EXIT_DISK_FULL, *FREE_EXITS)

FREE_MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("lost"), st.sampled_from(sorted(FREE_ENDS))),
        st.tuples(st.just("exit"), st.sampled_from(FREE_EXITS)),
        st.tuples(st.just("commit"), st.just(0)),
    ),
    max_size=40,
)
MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("lost"), st.sampled_from(sorted(EndReason))),
        st.tuples(st.just("exit"), st.sampled_from(EXITS)),
        st.tuples(st.just("commit"), st.just(0)),
        st.tuples(st.just("final"), st.just(0)),
        st.tuples(st.just("cancel"), st.just(0)),
    ),
    max_size=25,
)


def running(state: RunState, node: str = "n1") -> RunState:
    """The state with an attempt that runs, as far as one may."""
    begin = claimed(state.attempt + 1, node=node)
    return apply(state, begin) if refusal(state, begin) is None else state


def event(kind: str, what: EndReason | int, attempt: int) -> Event:
    if kind == "cancel":
        return CancelAsked(at=NOW)
    if isinstance(what, EndReason):
        return Lost(at=NOW, attempt=attempt, reason=what, detail="gone")
    return Exited(at=NOW, attempt=attempt, code=what, error="RuntimeError: again")


def admitted(state: RunState, record: Record) -> RunState:
    return apply(state, record) if refusal(state, record) is None else state


@given(FREE_MOVES, st.integers(1, 3))
def test_no_end_that_is_no_fault_of_the_run_ever_fails_it(
    moves: list[tuple[str, EndReason | int]], max_failures: int
) -> None:
    policy, state = Policy(max_failures=max_failures), RunState()
    for kind, what in moves:
        state = running(state)
        if kind == "commit":
            state = apply(state, committed(state.committed_step + 1, state.attempt))
        else:
            state = reduce(apply, advance(state, event(kind, what, state.attempt), policy), state)

        assert state.finished is None
        assert state.stalls == 0


@given(MOVES)
@example([("exit", 1), ("exit", 1)])
@example([("cancel", 0), ("lost", EndReason.NODE_LOST)])
def test_whatever_is_reported_twice_is_recorded_once_and_the_log_admits_all_of_it(
    moves: list[tuple[str, EndReason | int]],
) -> None:
    policy, state = Policy(max_failures=2), RunState()
    for n, (kind, what) in enumerate(moves):
        state = running(state, node=f"n{n % 2}")
        if kind in ("commit", "final"):
            step = state.committed_step + 1
            state = admitted(state, committed(step, max(state.attempt, 1), final=kind == "final"))
            continue
        news = event(kind, what, state.attempt)
        for record in advance(state, news, policy):
            assert refusal(state, record) is None
            state = apply(state, record)
        assert advance(state, news, policy) == ()
        assert state.finished or settle(state, NOW) == ()
        assert all(attempt.ended for attempt in state.attempts[:-1])


@given(MOVES, st.floats(0.1, 60.0), st.floats(60.0, 600.0))
def test_no_wait_is_longer_than_the_policy_allows(
    moves: list[tuple[str, EndReason | int]], backoff_s: float, max_backoff_s: float
) -> None:
    policy = Policy(max_failures=100, backoff_s=backoff_s, max_backoff_s=max_backoff_s)
    state = RunState()
    for kind, what in moves:
        state = running(state)
        if kind in ("lost", "exit"):
            state = reduce(apply, advance(state, event(kind, what, state.attempt), policy), state)

        assert 0.0 <= wait_s(state, policy) <= max_backoff_s


TRIED = st.builds(
    lambda step, not_before, avoid: (step, not_before, Avoided(node=avoid, because="") if avoid else None),
    st.sampled_from([0, 5]),
    st.sampled_from([0.0, 50.0]),
    st.sampled_from([None, "n0", "n1"]),
)


@given(
    st.lists(st.one_of(st.none(), TRIED), max_size=12),
    st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=4),
    st.one_of(st.none(), st.integers(0, 4)),
)
def test_of_runs_that_were_never_tried_the_first_are_enough_to_place(
    runs: list[tuple[int, float, Avoided | None] | None],
    slots: list[tuple[int, bool]],
    room: int | None,
) -> None:
    """The controller does not look at ten thousand queued runs for one free slot."""
    free = [
        FreeSlot(slot=f"n{node}/{n}", node=f"n{node}", up_since=node, last_choice=last)
        for n, (node, last) in enumerate(slots)
    ]
    queue, few, untried = [], [], 0
    for index, run in enumerate(runs):
        step, not_before, avoid = run or (0, float("-inf"), None)
        queued = QueuedRun(
            run_id=f"r{index}", index=index, committed_step=step, not_before=not_before, avoid=avoid
        )
        queue.append(queued)
        untried += run is None
        if run is not None or untried <= len(free):
            few.append(queued)

    assert assign(few, free, now=10.0, room=room) == assign(queue, free, now=10.0, room=room)
