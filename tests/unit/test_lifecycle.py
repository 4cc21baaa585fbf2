"""What one event adds to a run's log, in a table for each kind of event."""

import signal
from functools import reduce

import pytest
from support.lifecycle import NOW, POLICY, end, ended, exited, finished
from support.runs import claimed, committed, ref, state_after

from orchestrator.control.lifecycle import CancelAsked, Event, Lost, Phase, advance, phase, settle, wait_s
from storage.records import CancelRequested, Ended, EndReason, Outcome, Quarantined, Record, Started
from storage.run_state import RunState, apply

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
