"""What a log means: the fold, the fence, and invariants over arbitrary histories."""

from functools import reduce

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.runs import NO_DIGEST, claimed, committed, ended, finished, incarnation, ref, retired

from storage.records import (
    CancelRequested,
    Committed,
    EndReason,
    Entry,
    Outcome,
    Packed,
    Pinned,
    Quarantined,
    Reaped,
    Record,
    Started,
    StoredFile,
    Unpinned,
)
from storage.run_state import (
    RunState,
    fold,
    holds,
    refusal,
)


def state_after(*records: Record) -> RunState:
    return reduce(fold, map(entry, records), RunState())


def entry(record: Record) -> Entry:
    return Entry(seq=0, nonce="0" * 32, prev="", record=record)


def quarantined(step: int, attempt: int = 1) -> Quarantined:
    return Quarantined(checkpoint=ref(step, attempt), reason="sha256", at=1.0)


def refused(step: int, by: int, attempt: int = 1) -> Quarantined:
    """An attempt's word that it could not use a checkpoint."""
    return quarantined(step, attempt).model_copy(update={"attempt": by})


def test_a_run_that_was_preempted_resumes_from_its_newest_checkpoint() -> None:
    state = state_after(claimed(), committed(10), committed(20), ended(), claimed(2))

    assert state.running is not None
    assert (state.running.number, state.running.resumed_from) == (2, 20)
    assert state.newest == committed(20)
    assert (state.stalls, state.outcome, state.result) == (0, None, None)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (committed(30, attempt=1), "attempt 2 is the newest, attempt 1 is fenced"),
        (committed(30, attempt=3), "attempt 2 is the newest, attempt 3 is fenced"),
        (Started(attempt=1, step=0, at=0.0), "attempt 1 is fenced"),
        (ended(1), "attempt 1 is fenced"),
        (claimed(3), "attempt 2 is still running"),
        (committed(20, attempt=2), "step 20 is already committed"),
        (committed(15, attempt=2), "step 20 is already committed"),
        (committed(30, 2).model_copy(update={"incarnation": "f" * 8}), "claimed by another incarnation"),
        (retired(ref(20)), "is the newest checkpoint"),
        (retired(ref(11)), "not restorable: step 11"),
        (Reaped(checkpoints=(ref(10),), at=0.0), "not retired: step 10"),
        (quarantined(11), "not restorable any more"),
        (refused(20, by=1), "attempt 1 is fenced"),
        (refused(20, by=3), "attempt 2 is the newest, attempt 3 is fenced"),
    ],
)
def test_what_the_log_does_not_admit_is_refused_and_changes_nothing(record: Record, reason: str) -> None:
    state = state_after(claimed(), committed(10), committed(20), ended(), claimed(2))
    refused = refusal(state, record)
    assert refused is not None
    assert reason in refused
    assert fold(state, entry(record)) == state


def test_an_attempt_whose_end_is_recorded_may_not_commit() -> None:
    state = state_after(claimed(), ended(1))
    assert refusal(state, committed(10)) == "attempt 1 has ended"


def test_only_ends_that_are_the_runs_own_count_as_stalls() -> None:
    failed = state_after(claimed(), ended(1, EndReason.APP_ERROR), claimed(2), ended(2, EndReason.NODE_LOST))
    assert failed.stalls == 1
    recovered = state_after(claimed(), ended(1, EndReason.APP_ERROR), claimed(2), committed(10, 2))
    assert recovered.stalls == 0


def test_a_quarantined_checkpoint_is_never_resumed_from_and_its_step_can_be_reached_again() -> None:
    state = state_after(claimed(), committed(10), committed(20), ended(), claimed(2), quarantined(20))
    assert state.newest == committed(10)
    again = fold(state, entry(committed(20, attempt=2)))
    assert again.newest == committed(20, attempt=2)


def test_a_quarantined_checkpoint_is_not_committed_again_under_its_name() -> None:
    """Every later quarantine of it would be taken for the one that there was."""
    state = state_after(claimed(), committed(10), committed(20), quarantined(20))
    assert refusal(state, committed(20)) == "step 20 (attempt 1) is quarantined"
    assert refusal(state, committed(30)) is None


def test_the_only_checkpoint_stays_until_a_second_node_could_not_use_it_either() -> None:
    first = state_after(claimed(), committed(10), ended(), claimed(2), refused(10, by=2))
    assert (first.newest, first.quarantined) == (committed(10), ())
    assert holds(first, refused(10, by=2))
    assert refusal(first, refused(10, by=2)) == "attempt 2 has refused step 10 (attempt 1) already"

    same_node = (entry(ended(2)), entry(claimed(3)), entry(refused(10, by=3)))
    assert reduce(fold, same_node, first).newest == committed(10)
    other_node = (entry(ended(2)), entry(claimed(3, node="n2")), entry(refused(10, by=3)))
    assert reduce(fold, other_node, first).newest is None


def test_a_final_checkpoint_is_the_result() -> None:
    state = state_after(claimed(), committed(10), committed(20, final=True), finished())
    assert state.result == committed(20, final=True)
    assert state.outcome is Outcome.SUCCEEDED


def test_the_last_step_is_committed_as_final_by_another_attempt_only() -> None:
    """A checkpoint is named by its step and its attempt, and so is its data."""
    state = state_after(claimed(), committed(20))
    assert not holds(state, committed(20, final=True)), "it would be lost that it is the result"
    assert refusal(state, committed(20, final=True)) == "step 20 is already committed"

    resumed = state_after(claimed(), committed(20), ended(), claimed(2), committed(20, 2, final=True))
    assert resumed.result == committed(20, 2, final=True)
    assert holds(resumed, committed(20, 2, final=True))


Move = tuple[str, int, int]
MOVES = st.tuples(
    st.sampled_from(["claim", "start", "commit", "commit", "end", "retire", "reap", "quarantine", "cancel"]),
    st.sampled_from([0, 0, 0, -1, 1]),
    st.integers(-2, 3),
)
"""What a writer tries, relative to where the run is: mostly what is admitted, often what is not."""


def tried(state: RunState, move: Move) -> Record:
    kind, other_attempt, n = move
    attempt = max(1, state.attempt + other_attempt)
    # Counted from the newest checkpoint back, so that the newest itself is tried as well.
    chosen = state.checkpoints[-1 - abs(n)].ref if abs(n) < len(state.checkpoints) else ref(99, attempt)
    match kind:
        case "claim":
            return claimed(attempt + 1)
        case "start":
            return Started(attempt=attempt, step=0, at=0.0)
        case "commit":
            return committed(max(1, state.committed_step + n), attempt, final=n == 3)
        case "end":
            return ended(attempt, list(EndReason)[n])
        case "retire":
            return retired(chosen)
        case "reap":
            return Reaped(checkpoints=tuple(c.ref for c in state.retired) or (chosen,), at=0.0)
        case "quarantine":
            return Quarantined(checkpoint=chosen, attempt=attempt if n > 0 else None, reason="sha256", at=1.0)
        case _:
            return CancelRequested(at=0.0)


@given(st.lists(MOVES, max_size=60), st.booleans())
def test_any_history_keeps_its_promises(moves: list[Move], finish: bool) -> None:
    """Whatever writers try, in whatever order, admitted or not."""
    state = state_after(claimed())
    for move in [*moves, None] if finish else moves:
        record = tried(state, move) if move else finished()
        before, refused = state, refusal(state, record)
        state = fold(state, entry(record))

        assert refused is None or state == before, "a refused record changed the state"
        assert [a.number for a in state.attempts] == list(range(1, len(state.attempts) + 1))
        steps = [c.step for c in state.checkpoints]
        assert steps == sorted(set(steps)), "restorable steps are in order"
        assert not {c.ref for c in state.checkpoints} & {c.ref for c in state.retired}
        assert all(a.ended for a in state.attempts[:-1]), "two attempts run at once"
        if before.newest and record.kind != "quarantined":
            assert state.newest is not None, "the newest checkpoint went"
            assert state.newest.step >= before.newest.step
        new = [c for c in state.checkpoints if c not in before.checkpoints]
        if new:
            assert before.running is not None, "a commit without a running attempt"
            assert [(c.attempt, c.incarnation) for c in new] == [
                (before.running.number, incarnation(before.running.number))
            ]
        if refused is None and record.kind not in {"reaped", "quarantined"}:
            assert holds(state, record), "a written fact must be recognised when it is stated again"


def test_the_histories_above_reach_what_they_are_about() -> None:
    """Guards the test above against histories in which nothing is ever admitted."""
    seen: set[str] = set()

    @settings(database=None, derandomize=True)
    @given(st.lists(MOVES, max_size=60))
    def explore(moves: list[Move]) -> None:
        state = state_after(claimed())
        for move in moves:
            record = tried(state, move)
            admitted = refusal(state, record) is None
            seen.add(f"{record.kind} {'admitted' if admitted else 'refused'}")
            state = fold(state, entry(record))

    explore()
    kinds = {"claimed", "committed", "ended", "retired", "reaped", "quarantined"}
    assert seen >= {f"{kind} {what}" for kind in kinds for what in ("admitted", "refused")}


def salvaged(step: int, attempt: int = 1) -> Committed:
    return committed(step, attempt).model_copy(update={"resumable": False})


def whole(step: int, attempt: int = 1, *, adapter: str = NO_DIGEST) -> Committed:
    files = (
        StoredFile(name="adapter.safetensors", size_bytes=0, sha256=adapter),
        StoredFile(name="optimizer.safetensors", size_bytes=9, sha256=NO_DIGEST),
    )
    return committed(step, attempt).model_copy(update={"files": files})


def test_a_salvage_is_stored_and_never_resumed_from() -> None:
    state = state_after(claimed(), committed(10), salvaged(20), ended(), claimed(2))
    assert state.newest == committed(10)
    assert state.stored == (committed(10), salvaged(20))
    assert state.running is not None
    assert state.running.resumed_from == 10
    assert state_after(claimed(), salvaged(20), ended()).fruitless == 1, "no progress for the next attempt"


def test_the_whole_checkpoint_takes_its_salvages_place() -> None:
    state = state_after(claimed(), salvaged(20), whole(20))
    assert (state.checkpoints, state.salvaged, state.stored) == ((whole(20),), (), (whole(20),))
    assert holds(state, whole(20))
    assert holds(state, salvaged(20)), "it is part of what is there: a late second try is no new fact"
    assert not holds(state_after(claimed(), salvaged(20)), whole(20))


def test_how_a_file_is_packed_is_not_what_it_is() -> None:
    record = whole(20)
    packed = Packed(codec="shuffle4.zstd", size_bytes=3, sha256="1" * 64)
    other = record.model_copy(
        update={"files": tuple(f.model_copy(update={"packed": packed}) for f in record.files)}
    )
    assert holds(state_after(claimed(), record), other)
    assert not holds(state_after(claimed(), record), whole(20, adapter="2" * 64))


@pytest.mark.parametrize(
    ("history", "record", "reason"),
    [
        ((salvaged(20),), whole(20, adapter="2" * 64), "other files of step 20 are already committed"),
        ((salvaged(20),), salvaged(20), "other files of step 20"),
        ((committed(20),), salvaged(20), "step 20 is already committed"),
        ((committed(20),), salvaged(10), "step 20 is already committed"),
        ((salvaged(20),), retired(ref(20)), "attempt 1 may still complete step 20"),
        ((salvaged(10), salvaged(20), ended(), retired(ref(10))), claimed(2), None),
        ((salvaged(20), ended()), retired(ref(20)), None),
        ((salvaged(20), committed(30)), retired(ref(20)), None),
    ],
)
def test_what_may_follow_a_salvage(history: tuple[Record, ...], record: Record, reason: str | None) -> None:
    state = state_after(claimed(), *history)
    found = refusal(state, record)
    assert (found is None) if reason is None else (found is not None and reason in found)


def pinned(step: int, attempt: int = 1) -> Pinned:
    return Pinned(checkpoint=ref(step, attempt), at=1.0)


def unpinned(step: int, attempt: int = 1) -> Unpinned:
    return Unpinned(checkpoint=ref(step, attempt), at=1.0)


def test_a_pin_keeps_a_checkpoint_until_it_is_taken_away() -> None:
    story = (claimed(), committed(10), committed(20), committed(30), pinned(10))
    state = state_after(*story)

    assert state.pinned == (ref(10),)
    assert refusal(state, retired(ref(10), ref(20))) == "pinned: step 10 (attempt 1)"
    assert refusal(state, retired(ref(20))) is None
    assert refusal(state_after(*story, unpinned(10)), retired(ref(10))) is None


def test_only_what_is_there_can_be_pinned_and_only_what_is_pinned_unpinned() -> None:
    state = state_after(claimed(), committed(10), committed(20), committed(30), retired(ref(10)))

    assert refusal(state, pinned(10)) == "step 10 (attempt 1) is not there (any more)"
    assert refusal(state, pinned(40)) == "step 40 (attempt 1) is not there (any more)"
    assert refusal(state, unpinned(20)) == "step 20 (attempt 1) is not pinned"
    assert refusal(state, pinned(20)) is None


def test_pinning_is_possible_when_the_run_is_over_and_saying_it_twice_is_once() -> None:
    over = state_after(claimed(), committed(10), finished())
    assert refusal(over, pinned(10)) is None

    twice = state_after(claimed(), committed(10), finished(), pinned(10))
    assert holds(twice, pinned(10))
    assert not holds(twice, unpinned(10))
    assert state_after(claimed(), committed(10), finished(), pinned(10), pinned(10)) == twice
    assert (
        refusal(state_after(claimed(), committed(10), finished(), pinned(10), unpinned(10)), pinned(10))
        is None
    )


def test_a_salvage_can_be_pinned() -> None:
    salvage = committed(20).model_copy(update={"resumable": False})
    state = state_after(claimed(), committed(10), salvage, ended(), pinned(20))

    assert state.pinned == (ref(20),)
    assert state.newest == committed(10)
    assert refusal(state, retired(ref(20))) == "pinned: step 20 (attempt 1)"
