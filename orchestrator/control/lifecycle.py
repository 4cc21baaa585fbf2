"""The life of one run, as pure functions.

``advance(state, event, policy)`` returns the records that the controller must append; the next state is their
fold, so there is no other truth than the log. Nothing here reads a clock, touches the network or imports Ray:
time arrives on the event, effects leave as records.

    QUEUED --claimed--> RUNNING --exit 0, final checkpoint committed--> SUCCEEDED
      ^                    |------exit 78, or too many stalls---------> FAILED
      |                    |------anything, once cancelling was asked-> CANCELLED
      '--preempted, lost---'

Preemption is an event, not a state: a preempted run is queued again. What counts against a run is a *stall*,
an attempt that ended through no machine's fault without a new committed step.
"""

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from functools import reduce
from typing import assert_never

from storage.records import (
    CancelRequested,
    Ended,
    EndReason,
    Finished,
    Outcome,
    Quarantined,
    Record,
)
from storage.run_state import (
    FREE_ENDS,
    RunState,
    apply,
    refusal,
)
from trainer.evidence import NO_EVIDENCE, Evidence, attributed, told
from trainer.rundir import (
    EXIT_BAD_CHECKPOINT,
    EXIT_BAD_CONFIG,
    EXIT_COMPLETE,
    EXIT_PREEMPTED,
)

from .blame import advised, proof

AT_ONCE = 2
"""So many preemptions in a row without progress are followed by the next attempt without any wait."""


class Phase(StrEnum):
    """Where a run is; derived from its log, never stored."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    FINISHED = "FINISHED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How patient the controller is with a run."""

    max_failures: int = 3
    """Consecutive stalls after which the run has failed."""
    backoff_s: float = 5.0
    """Wait after the first stall, or after the third preemption in a row without progress; then doubled."""
    max_backoff_s: float = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """How long a queued run is left alone, and why."""

    seconds: float = 0.0
    because: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exited:
    """The training process is gone and its checkpoints are pushed. ``code`` is negative for a signal."""

    at: float
    attempt: int
    code: int
    error: str = ""
    """The last exception, one line."""
    evidence: Evidence = NO_EVIDENCE
    step: int = 0
    step_s: float = 0.0
    asked: bool = False
    """Its agent had asked it to stop: whoever wanted that, nobody may know any more."""
    drained: bool = False
    """Its node is drained, as far as is known."""
    notice: str = ""
    """It was asked to stop because of this notice of its node's end."""
    saved_s: float | None = None
    """From being asked until its last checkpoint was in the store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """The slot that ran the attempt is gone, or has been silent for too long."""

    at: float
    attempt: int
    reason: EndReason
    detail: str
    step: int = 0
    step_s: float = 0.0
    silent_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelAsked:
    """A person wants the run to stop."""

    at: float


Event = Exited | Lost | CancelAsked


def phase(state: RunState) -> Phase:
    if state.finished:
        return Phase.FINISHED
    return Phase.RUNNING if state.running else Phase.QUEUED


def advance(
    state: RunState, event: Event, policy: Policy, suspects: Collection[str] = ()
) -> tuple[Record, ...]:
    """Return what the event adds to the log; nothing for a ghost's event or one that was already recorded.

    Args:
        suspects: Nodes in ill repute: what happens there proves nothing against a run.
    """
    if state.finished:
        return ()
    if isinstance(event, CancelAsked):
        asked = () if state.cancel_requested else (CancelRequested(at=event.at),)
        return (*asked, *_settled(state, asked, event.at))
    if state.running is None or event.attempt != state.attempt:
        return ()
    match event:
        case Lost():
            ended = Ended(
                attempt=event.attempt,
                reason=event.reason,
                detail=event.detail,
                step=event.step,
                silent_s=event.silent_s,
                step_s=event.step_s,
                at=event.at,
            )
            settled = _settled(state, (ended,), event.at)
            return (ended, *(settled or _given_up(state, (ended,), ended, policy, suspects)))
        case Exited():
            return _after_exit(state, event, policy, suspects)
        case _:
            assert_never(event)


def settle(state: RunState, now: float) -> tuple[Record, ...]:
    """Return what is due on a run that no attempt holds: its result is complete, or it is to be cancelled."""
    if state.finished or state.running:
        return ()
    if state.result:
        return (Finished(outcome=Outcome.SUCCEEDED, step=state.result.step, at=now),)
    if state.cancel_requested:
        return (Finished(outcome=Outcome.CANCELLED, step=state.committed_step, at=now),)
    return ()


def wait_s(state: RunState, policy: Policy) -> float:
    """Return how long after its last attempt's end the queued run may be launched again."""
    return wait(state, policy).seconds


def wait(state: RunState, policy: Policy) -> Wait:
    """Return how long after its last attempt's end the queued run may be launched again, and why.

    A lost machine is replaced at once, and again; if nothing comes of that either, replacing it faster than
    the store, or whatever it is, recovers helps nobody.
    """
    last = state.attempts[-1].ended if state.attempts else None
    if last is None:
        return Wait()
    waits, because = state.fruitless - AT_ONCE, f"{state.fruitless} attempts in a row committed nothing"
    if (
        last.reason not in FREE_ENDS | {EndReason.AGENT_LOST}  # which may be how a lost node shows first
        and state.stalls >= waits
    ):
        waits = state.stalls
        times = "an attempt" if waits == 1 else f"{waits} attempts in a row"
        because = f"{times} failed without a new checkpoint"
    if waits <= 0:
        return Wait()
    doublings = min(waits - 1, 64)  # the limit is long reached; 2.0 ** 1024 is no number
    return Wait(seconds=min(policy.backoff_s * 2.0**doublings, policy.max_backoff_s), because=because)


def _settled(state: RunState, records: tuple[Record, ...], now: float) -> tuple[Record, ...]:
    for record in records:
        if refusal(state, record) is None:
            state = apply(state, record)
    return settle(state, now)


def _after_exit(
    state: RunState, event: Exited, policy: Policy, suspects: Collection[str]
) -> tuple[Record, ...]:
    if event.code == EXIT_COMPLETE and state.result:
        return (Finished(outcome=Outcome.SUCCEEDED, step=state.result.step, at=event.at),)
    sound = state.attempts[-1].claimed.node not in suspects  # which may have misled the trainer
    if event.code == EXIT_BAD_CONFIG and sound and not (state.result or state.cancel_requested):
        detail = event.error or "the trainer refused its configuration"
        return (Finished(outcome=Outcome.FAILED, detail=detail, step=event.step, at=event.at),)
    ended = Ended(
        attempt=event.attempt,
        reason=_reason(event),
        detail=_detail(event),
        step=event.step,
        exit_code=event.code,
        step_s=event.step_s,
        saved_s=event.saved_s,
        memory_bytes=event.evidence.memory_bytes,
        at=event.at,
    )
    records: tuple[Record, ...] = (*_quarantine(state, event), ended)
    settled = _settled(state, records, event.at)
    return (*records, *(settled or _given_up(state, records, ended, policy, suspects)))


def _reason(event: Exited) -> EndReason:
    if _was_stopped(event) and event.notice:
        return EndReason.SPOT_NOTICE
    asked = event.asked and _was_stopped(event)
    return EndReason.DRAINED if asked else attributed(event.code, event.evidence, event.error)


def _was_stopped(event: Exited) -> bool:
    """Whether it may have ended because it was asked to; one that did not save itself in time was killed."""
    return event.code < 0 or event.code == EXIT_PREEMPTED


def _quarantine(state: RunState, event: Exited) -> tuple[Quarantined, ...]:
    """Return the attempt's word against the checkpoint that it resumed from and could not use."""
    running, resumed = state.running, state.newest
    if event.code != EXIT_BAD_CHECKPOINT or resumed is None:
        return ()
    if running and (running.committed_step is not None or running.refused):
        return ()  # it did train on from there, and the newest checkpoint is its own; or it has had its word
    reason = _detail(event)
    return (Quarantined(checkpoint=resumed.ref, attempt=event.attempt, reason=reason, at=event.at),)


def _given_up(
    state: RunState,
    records: tuple[Record, ...],
    ended: Ended,
    policy: Policy,
    suspects: Collection[str],
) -> tuple[Record, ...]:
    """Return FAILED if this end was one stall too many, or shows that any further one would be the same."""
    if ended.reason in FREE_ENDS:
        return ()
    after = reduce(apply, records, state)
    why = proof(state, ended, suspects) or _too_often(state, after, policy)
    if why is None:
        return ()
    detail = advised(ended.reason, f"{ended.detail}; {why} (step {after.committed_step})")
    return (Finished(outcome=Outcome.FAILED, detail=detail, step=ended.step, at=ended.at),)


def _too_often(state: RunState, after: RunState, policy: Policy) -> str | None:
    if after.stalls == state.stalls:
        return None
    why = None
    # Who begins anew tries something that none of these attempts did.
    if after.stalls >= policy.max_failures and not (state.newest and after.newest is None):
        why = f"no new checkpoint in {after.stalls} attempt{'' if after.stalls == 1 else 's'}"
    if after.quarantined != state.quarantined:
        # Each time the step is reached again and committed, which is progress as far as stalls can tell.
        step = after.quarantined[-1][0].step
        times = sum(ref.step == step for ref, _ in after.quarantined)
        if times >= policy.max_failures:
            why = f"the checkpoint of step {step} was refused {times} times"
    return why


def _detail(event: Exited) -> str:
    if _was_stopped(event) and event.notice:
        return event.notice
    if event.asked and _was_stopped(event):
        saved = "saved its state" if event.code == EXIT_PREEMPTED else "did not save itself in time"
        because = ", because its node is drained," if event.drained else ""
        return f"the trainer was asked to stop{because} and {saved}"
    return told(event.code, event.evidence, event.error)
