"""What attempts came to, in numbers: ends by reason, what they lost, and how much of the time was of use."""

from support.runs import claimed, committed, state_after

from orchestrator.reports.tally import Tally, added, goodput, tally
from storage.records import Claimed, Committed, Ended, EndReason, Finished, Outcome, Started
from storage.run_state import RunState


def start(attempt: int, at: float, step: int = 0) -> tuple[Claimed, Started]:
    return (
        claimed(attempt).model_copy(update={"at": at}),
        Started(attempt=attempt, step=step, at=at + 10.0),
    )


def commit(step: int, attempt: int, at: float) -> Committed:
    return committed(step, attempt).model_copy(update={"at": at})


def end(attempt: int, reason: EndReason, step: int, at: float) -> Ended:
    return Ended(attempt=attempt, reason=reason, step=step, step_s=0.5, at=at)


LIFE = (
    *start(1, 0.0),
    commit(10, 1, 30.0),
    end(1, EndReason.NODE_LOST, 14, 40.0),
    *start(2, 50.0, 10),
    commit(20, 2, 80.0),
    end(2, EndReason.SPOT_NOTICE, 20, 90.0),
    *start(3, 100.0, 20),
    end(3, EndReason.SPOT_NOTICE, 21, 120.0),
)


def test_ends_and_losses_are_counted_by_reason() -> None:
    found = tally(state_after(*LIFE))

    assert found.ends == {"NODE_LOST": 1, "SPOT_NOTICE": 2}
    assert (found.lost_steps["NODE_LOST"], found.lost_steps["SPOT_NOTICE"]) == (4, 1)
    assert found.lost_s == {"NODE_LOST": 2.0, "SPOT_NOTICE": 0.5}
    assert found.notices == {"saved": 1, "late": 1}


def test_the_attempt_that_ended_its_run_counts_by_how_the_run_ended() -> None:
    over = Finished(outcome=Outcome.SUCCEEDED, step=20, at=90.0)

    assert tally(state_after(*start(1, 0.0), commit(20, 1, 80.0), over)).ends == {"SUCCEEDED": 1}
    assert tally(state_after(Finished(outcome=Outcome.CANCELLED, at=0.0))).ends == {}, "it never had one"


def test_only_what_is_new_is_added() -> None:
    before, now = tally(state_after(*LIFE[:4])), tally(state_after(*LIFE))

    assert added(now, now) == Tally()
    new = added(now, before)
    assert (new.ends, new.lost_s) == ({"SPOT_NOTICE": 2}, {"SPOT_NOTICE": 0.5})
    assert added(before, now) == Tally(), "nothing is taken back"


def test_goodput_is_preserved_time_by_allocated_time() -> None:
    state = state_after(*LIFE[:4])
    assert goodput({"a": state}, now=1000.0) == 20.0 / 40.0

    running = state_after(*LIFE[:3])  # not ended: it holds its slot until now
    assert goodput({"a": running}, now=100.0) == 20.0 / 100.0
    assert goodput({"a": state, "b": running}, now=100.0) == 40.0 / 140.0
    assert goodput({"a": RunState()}, now=1.0) is None


def test_no_clock_makes_goodput_leave_its_bounds() -> None:
    fast = state_after(*start(1, 0.0), commit(10, 1, 9e9), end(1, EndReason.NODE_LOST, 10, 40.0))
    slow = state_after(*start(1, 100.0), commit(10, 1, -5.0), end(1, EndReason.NODE_LOST, 10, 140.0))

    assert goodput({"a": fast}, now=0.0) == 1.0
    assert goodput({"a": slow}, now=0.0) == 0.0
