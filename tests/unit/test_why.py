"""The sentences that say why a run was interrupted and what it cost."""

from datetime import UTC, datetime

import pytest
from support.runs import incarnation, lived, state_after

from orchestrator.reports.describing import _attempt, _attempt_text
from orchestrator.reports.why import Interruption, interruptions, timeline, why
from storage.log import run_log
from storage.memory import MemoryStore
from storage.records import (
    CancelRequested,
    CheckpointRef,
    Claimed,
    Committed,
    Ended,
    EndReason,
    Finished,
    Outcome,
    Quarantined,
    Reaped,
    Record,
    Retired,
    Started,
    StoredFile,
)

NOON = datetime(2026, 5, 4, 12, 0, 0, tzinfo=UTC).timestamp()


def clock(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%H:%M:%S")


def claimed(attempt: int, node: str, at: float = 0.0) -> Claimed:
    return Claimed(
        attempt=attempt, incarnation=incarnation(attempt), node=node, slot=f"{node}/0", at=NOON + at
    )


def started(attempt: int, step: int, at: float) -> Started:
    return Started(attempt=attempt, step=step, at=NOON + at)


def committed(step: int, attempt: int = 1, *, final: bool = False, at: float = 0.0) -> Committed:
    file = StoredFile(name="adapter.safetensors", size_bytes=1_234_567, sha256="0" * 64)
    return Committed(
        attempt=attempt,
        incarnation=incarnation(attempt),
        step=step,
        files=(file,),
        final=final,
        at=NOON + at,
    )


def ended(
    attempt: int,
    reason: EndReason,
    *,
    step: int,
    at: float,
    detail: str = "",
    silent_s: float = 0.0,
    step_s: float = 0.0,
) -> Ended:
    return Ended(
        attempt=attempt,
        reason=reason,
        detail=detail,
        step=step,
        silent_s=silent_s,
        step_s=step_s,
        at=NOON + at,
    )


def finished(outcome: Outcome, step: int, detail: str = "") -> Finished:
    return Finished(outcome=outcome, step=step, detail=detail, at=NOON + 900)


def told(*records: Record, max_steps: int = 2000, price_per_hour: float | None = None) -> str:
    return why(state_after(*records), max_steps, price_per_hour, at=clock)


BEGUN = (claimed(1, "n1"), started(1, 0, at=5))


def test_a_run_that_has_not_started() -> None:
    assert told() == "Not started yet: no slot was free."


def test_a_run_that_was_cancelled_before_it_started() -> None:
    assert told(CancelRequested(at=NOON), finished(Outcome.CANCELLED, 0)) == "Never started; CANCELLED."


def test_a_run_that_was_never_interrupted() -> None:
    assert told(*BEGUN, committed(500)) == ("Never interrupted; running on n1, step 500 of 2000 committed.")
    over = (*BEGUN, committed(2000, final=True), finished(Outcome.SUCCEEDED, 2000))
    assert told(*over) == "Never interrupted; SUCCEEDED at step 2000 of 2000."


def test_a_lost_node_with_what_it_cost_in_steps_seconds_and_money() -> None:
    lost = ended(1, EndReason.NODE_LOST, step=1532, at=600, silent_s=9.0, step_s=1.25)
    history = (*BEGUN, committed(1500), lost, claimed(2, "n2"), started(2, 1500, at=622))

    assert told(*history, price_per_hour=0.9) == (
        "Restarted once; running on n2, step 1500 of 2000 committed.\n"
        "12:10:00 node n1 was lost (no notice): resumed from step 1500 of 1532, "
        "lost 32 steps = 40.0 s = $0.0100; 9.0 s to notice, 22.0 s to be training again."
    )
    assert "lost 32 steps = 40.0 s; 9.0 s to notice" in told(*history)


def test_a_node_that_stopped_answering_while_its_run_waits_for_another() -> None:
    lost = ended(1, EndReason.NODE_UNREACHABLE, step=501, at=600, silent_s=91.0, step_s=0.5)

    assert told(*BEGUN, committed(500), lost) == (
        "Interrupted once; waiting for a slot, step 500 of 2000 committed.\n"
        "12:10:00 node n1 stopped answering (no notice): reached step 501, "
        "lost 1 step = 0.5 s; 91.0 s to notice."
    )


@pytest.mark.parametrize("step", [0, 344])
def test_a_loss_of_which_nobody_heard_is_told_as_at_least(step: int) -> None:
    lost = ended(1, EndReason.NODE_LOST, step=step, at=600, detail="n1 is not part of the cluster any more")
    history = (*BEGUN, committed(344), lost)

    assert told(*history).endswith(
        "node n1 was lost (no notice): reached at least step 344, "
        "lost at least 0 steps (nobody reported more)."
    )
    assert told(*history, claimed(2, "n2"), started(2, 344, at=610)).endswith(
        "resumed from step 344 of at least 344, lost at least 0 steps (nobody reported more); "
        "10.0 s to be training again."
    )


def test_a_drained_attempt_loses_nothing() -> None:
    drained = ended(
        1,
        EndReason.DRAINED,
        step=1240,
        at=600,
        step_s=0.5,
        detail="the trainer was asked to stop and saved its state",
    )

    assert told(*BEGUN, committed(1240), drained, claimed(2, "n2"), started(2, 1240, at=609.5)) == (
        "Restarted once; running on n2, step 1240 of 2000 committed.\n"
        "12:10:00 the trainer on n1 was asked to stop and saved its state: "
        "resumed from step 1240 of 1240, lost 0 steps; 9.5 s to be training again."
    )


def test_a_lost_agent_before_the_first_step() -> None:
    lost = ended(1, EndReason.AGENT_LOST, step=0, at=60)

    assert told(claimed(1, "n1"), lost, claimed(2, "n1")) == (
        "Restarted once; running on n1, step 0 of 2000 committed.\n"
        "12:01:00 the agent on n1 died: resumed from step 0 of 0, lost 0 steps."
    )


def test_a_killed_trainer() -> None:
    killed = ended(
        1, EndReason.KILLED, step=30, at=60, detail="the trainer was killed by SIGKILL", step_s=2.0
    )

    assert told(*BEGUN, committed(20), killed, claimed(2, "n1"), started(2, 20, at=61)) == (
        "Restarted once; running on n1, step 20 of 2000 committed.\n"
        "12:01:00 the trainer on n1 was killed by SIGKILL: "
        "resumed from step 20 of 30, lost 10 steps = 20.0 s; 1.0 s to be training again."
    )


def test_a_spot_notice_and_a_takeover() -> None:
    noticed = ended(1, EndReason.SPOT_NOTICE, step=20, at=60)
    replaced = ended(2, EndReason.SUPERSEDED, step=20, at=120)

    assert told(*BEGUN, committed(20), noticed, claimed(2, "n2"), replaced, claimed(3, "n3")) == (
        "Restarted twice; running on n3, step 20 of 2000 committed.\n"
        "12:01:00 spot notice on n1: resumed from step 20 of 20, lost 0 steps.\n"
        "12:02:00 a newer attempt took over from n2: resumed from step 20 of 20, lost 0 steps."
    )


def test_a_damaged_checkpoint_costs_the_steps_back_to_the_one_before_it() -> None:
    lost = ended(1, EndReason.NODE_LOST, step=32, at=60, step_s=1.0)
    unusable = Quarantined(
        checkpoint=CheckpointRef(step=30, attempt=1), reason="adapter.safetensors: sha256 differs", at=NOON
    )
    history = (*BEGUN, committed(20), committed(30), lost, claimed(2, "n2"), unusable, started(2, 20, at=62))

    assert told(*history) == (
        "Restarted once; running on n2, step 20 of 2000 committed.\n"
        "12:01:00 node n1 was lost (no notice): resumed from step 20 of 32, lost 12 steps = 12.0 s; "
        "2.0 s to be training again.\n"
        "The checkpoint of step 30 (attempt 1) was set aside, and the one before it is used: "
        "adapter.safetensors: sha256 differs."
    )


def test_what_an_attempt_cost_counts_from_where_it_really_began() -> None:
    unusable = Quarantined(checkpoint=CheckpointRef(step=30, attempt=1), reason="torn", at=NOON)
    state = state_after(
        *BEGUN,
        committed(20),
        committed(30),
        ended(1, EndReason.NODE_LOST, step=30, at=60),
        claimed(2, "n2"),
        unusable,
        started(2, 20, at=70),
        ended(2, EndReason.NODE_LOST, step=25, at=80),
        claimed(3, "n3"),
        started(3, 20, at=90),
    )

    assert [(cut.reached_step, cut.resumed_step, cut.lost_steps) for cut in interruptions(state)] == [
        (30, 20, 10),
        (25, 20, 5),
    ]


def test_a_run_that_failed_says_why_and_counts_no_restart_after_its_end() -> None:
    detail = "the trainer exited with code 1: ValueError: no"
    end = "ValueError: no; the same error twice (step 0)"
    history = (
        *BEGUN,
        ended(1, EndReason.APP_ERROR, step=3, at=60, detail=detail, step_s=1.0),
        claimed(2, "n2"),
        started(2, 0, at=65),
        ended(2, EndReason.APP_ERROR, step=4, at=70, detail=detail, step_s=1.0),
        finished(Outcome.FAILED, 4, end),
    )

    assert told(*history) == (
        f"Restarted once; FAILED at step 4 of 2000: {end}.\n"
        "12:01:00 the trainer on n1 exited with code 1: ValueError: no: "
        "resumed from step 0 of 3, lost 3 steps = 3.0 s; 5.0 s to be training again.\n"
        "12:01:10 the trainer on n2 exited with code 1: ValueError: no: reached step 4, lost 4 steps = 4.0 s."
    )


def test_clocks_that_disagree_never_give_a_negative_time() -> None:
    lost = ended(1, EndReason.NODE_LOST, step=20, at=60)
    state = state_after(*BEGUN, committed(20), lost, claimed(2, "n2"), started(2, 20, at=-3600))

    assert interruptions(state) == (
        Interruption(
            attempt=state.attempts[0],
            reached_step=20,
            resumed_step=20,
            lost_steps=0,
            unreported=True,
            lost_s=0.0,
            detect_s=0.0,
            again_s=0.0,
        ),
    )


@pytest.mark.parametrize("at", [1e300, -1e300, 1e12])
def test_a_time_that_no_calendar_has_is_told_as_none(at: float) -> None:
    log = run_log(MemoryStore(), "cat")
    for record in (
        claimed(1, "n1"),
        Started(attempt=1, step=0, at=at),
        ended(1, EndReason.NODE_LOST, step=0, at=at),
    ):
        log.append(record.model_copy(update={"at": at}))
    assert timeline(log.entries())[1] == "(no time)  attempt 1 training, from step 0"
    assert "(no time) node n1 was lost" in why(log.state, 10)
    assert _attempt_text(_attempt(log.state.attempts[0])).startswith("on n1 from (no time)")


def test_the_timeline_tells_every_record() -> None:
    first = CheckpointRef(step=500, attempt=1)
    history = (
        *BEGUN,
        committed(500, at=10),
        committed(1000, at=20),
        Retired(checkpoints=(first,), at=NOON + 21),
        Reaped(checkpoints=(first,), at=NOON + 22),
        Quarantined(checkpoint=CheckpointRef(step=1000, attempt=1), reason="torn", at=NOON + 23),
        ended(1, EndReason.NODE_LOST, step=1100, at=30, detail="n1 was lost without notice"),
        claimed(2, "n2", at=31),
        committed(1500, 2, at=40),
        Quarantined(checkpoint=CheckpointRef(step=1500, attempt=2), attempt=2, reason="rot", at=NOON + 41),
        committed(2000, 2, final=True, at=60),
        CancelRequested(at=NOON + 61),
        finished(Outcome.SUCCEEDED, 2000),
    )
    log = lived(MemoryStore(), "cat", *history)

    assert timeline(log.entries(), at=clock) == [
        "12:00:00  attempt 1 placed on n1",
        "12:00:05  attempt 1 training, from step 0",
        "12:00:10  step 500 committed by attempt 1, 1.23 MB",
        "12:00:20  step 1000 committed by attempt 1, 1.23 MB",
        "12:00:21  retired step 500 (attempt 1)",
        "12:00:22  deleted step 500 (attempt 1)",
        "12:00:23  set aside step 1000 (attempt 1): torn",
        "12:00:30  attempt 1 ended at step 1100: NODE_LOST, n1 was lost without notice",
        "12:00:31  attempt 2 placed on n2",
        "12:00:40  step 1500 committed by attempt 2, 1.23 MB",
        "12:00:41  attempt 2 could not use step 1500 (attempt 2): rot",
        "12:01:00  step 2000 committed by attempt 2, 1.23 MB (final)",
        "12:01:01  cancelling was asked for",
        "12:15:00  SUCCEEDED at step 2000",
    ]
