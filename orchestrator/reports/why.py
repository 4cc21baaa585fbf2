"""Why a run was interrupted and what it cost, in plain sentences. Pure: a fold of the log, in words."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import zip_longest

from storage.records import (
    CheckpointRef,
    Ended,
    EndReason,
    Record,
    RunEntry,
)
from storage.redaction import printable, redacted
from storage.run_state import UNHEARD_ENDS, Attempt, RunState

_CAUSES = {
    EndReason.SPOT_NOTICE: "spot notice on {node}",
    EndReason.NODE_LOST: "node {node} was lost (no notice)",
    EndReason.NODE_UNREACHABLE: "node {node} stopped answering (no notice)",
    EndReason.AGENT_LOST: "the agent on {node} died",
    EndReason.SUPERSEDED: "a newer attempt took over from {node}",
    EndReason.DRAINED: "asked to stop on {node}",
    EndReason.STORAGE_DOWN: "{node} could not reach the store",
    EndReason.HUB_DOWN: "{node} could not fetch the base model from its hub",
    EndReason.DISK_FULL: "the disk of {node} is full or cannot be written",
    EndReason.APP_ERROR: "the trainer failed on {node}",
    EndReason.BAD_CONFIG: "the trainer refused its configuration",
    EndReason.KILLED: "the trainer on {node} was killed",
    EndReason.CKPT_INVALID: "the trainer on {node} could not use its checkpoint",
    EndReason.OOM_GPU: "the GPU of {node} has too little memory",
    EndReason.OOM_HOST: "{node} has too little memory",
    EndReason.CUDA_ERROR: "the GPU or its driver failed on {node}",
    EndReason.STALLED: "the trainer on {node} hung",
    EndReason.NAN_LOSS: "the loss was not finite on {node}",
    EndReason.NODE_UNFIT: "{node} is not fit to train",
    EndReason.USER_CANCEL: "cancelled",
}
"""Others tell of such an end; the step is what the attempt had reported, if who heard it is still there."""
_TRAINER = "the trainer "
_NOTICE = " notice from "
NO_TIME = "(no time)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Interruption:
    """One end of an attempt, and what came of it."""

    attempt: Attempt
    reached_step: int
    resumed_step: int | None
    """None while the run waits for its next attempt."""
    lost_steps: int
    unreported: bool
    """It may have lost more steps: nobody who is left heard of any after its newest commit."""
    lost_s: float
    detect_s: float
    again_s: float | None
    """From noticing the end to the first step of the next attempt; None if that step is not made yet."""


def interruptions(state: RunState) -> tuple[Interruption, ...]:
    """Return what each ended attempt cost, in order."""
    found = []
    for attempt, following in zip_longest(state.attempts, state.attempts[1:]):
        if attempt.ended is None:
            continue
        resumed = _begins_at(following) if following else state.committed_step
        known = max(attempt.committed_step or 0, _begins_at(attempt))
        reached = max(attempt.ended.step, known)
        unheard = attempt.started is not None and attempt.ended.reason in UNHEARD_ENDS
        lost = max(0, reached - resumed)
        started = following.started if following else None
        found.append(
            Interruption(
                attempt=attempt,
                reached_step=reached,
                resumed_step=resumed if following else None,
                lost_steps=lost,
                unreported=unheard and attempt.ended.step <= known and not attempt.ended.step_s,
                lost_s=lost * attempt.ended.step_s,
                detect_s=attempt.ended.silent_s,
                again_s=max(0.0, started.at - attempt.ended.at) if started else None,
            )
        )
    return tuple(found)


def _begins_at(attempt: Attempt) -> int:
    """The step from which an attempt trains: an earlier one than was planned if a checkpoint was unusable."""
    return attempt.started.step if attempt.started else attempt.resumed_from


def why(
    state: RunState,
    max_steps: int,
    price_per_hour: float | None = None,
    at: Callable[[float], str] | None = None,
) -> str:
    """Return the sentences: how often the run was restarted, and for each time why and at what cost.

    Args:
        price_per_hour: USD; adds what the lost steps cost.
        at: Formats a time; by default the local time of day.
    """
    clock = at or _time_of_day
    sentences = [_summary(state, max_steps)]
    for interruption in interruptions(state):
        sentences.append(_sentence(interruption, price_per_hour, clock))
    for ref, reason in state.quarantined:
        sentences.append(_quarantine(ref, reason))
    return "\n".join(shown_line(sentence) for sentence in sentences)


def timeline(entries: Sequence[RunEntry], at: Callable[[float], str] | None = None) -> list[str]:
    """Return the log as lines for a person."""
    clock = at or _time_of_day
    return [shown_line(f"{clock(entry.record.at)}  {told(entry.record)}") for entry in entries]


def moment_of(seconds: float) -> datetime | None:
    """A record's time, by whatever clock its writer had; None: no calendar has it."""
    try:
        return datetime.fromtimestamp(seconds).astimezone()
    except (OverflowError, ValueError, OSError):
        return None


def date_and_time(seconds: float) -> str:
    """Format a time as a person here reads it."""
    moment = moment_of(seconds)
    return moment.strftime("%Y-%m-%d %H:%M:%S") if moment else NO_TIME


def _time_of_day(seconds: float) -> str:
    moment = moment_of(seconds)
    return moment.strftime("%H:%M:%S") if moment else NO_TIME


def shown_line(line: str) -> str:
    """Return a line that is safe to print: what nodes are called and trainers say is not ours."""
    return redacted(printable(line)).replace("\n", " ")


def _summary(state: RunState, max_steps: int) -> str:
    if not state.attempts:
        if state.finished:
            return f"Never started; {state.finished.outcome}."
        return "Not started yet: no slot was free."
    waiting = not state.finished and not state.running
    # An attempt whose end was the end of the run was not restarted.
    cuts = len(state.attempts) if waiting else len(state.attempts) - 1
    times = f"{'Interrupted' if waiting else 'Restarted'} {_times(cuts)}" if cuts else "Never interrupted"
    if state.finished:
        detail = f": {state.finished.detail}" if state.finished.detail else ""
        return f"{times}; {state.finished.outcome} at step {state.finished.step} of {max_steps}{detail}."
    doing = f"running on {state.running.claimed.node}" if state.running else "waiting for a slot"
    return f"{times}; {doing}, step {state.committed_step} of {max_steps} committed."


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _sentence(cut: Interruption, price_per_hour: float | None, clock: Callable[[float], str]) -> str:
    ended = cut.attempt.ended
    assert ended is not None
    because = cause(ended, cut.attempt.claimed.node)
    least = "at least " if cut.unreported else ""
    cost = f"lost {least}{cut.lost_steps} step{'' if cut.lost_steps == 1 else 's'}"
    if cut.lost_s:
        cost += f" = {cut.lost_s:.1f} s"
        if price_per_hour is not None:
            cost += f" = ${cut.lost_s / 3600 * price_per_hour:.4f}"
    if cut.resumed_step is None:
        resumed = f"reached {least}step {cut.reached_step}"
    else:
        resumed = f"resumed from step {cut.resumed_step} of {least}{cut.reached_step}"
    if ended.saved_s is not None and cut.attempt.committed_step is not None:
        resumed = f"saved step {cut.attempt.committed_step} in {ended.saved_s:.1f} s"
    if cut.unreported:
        cost += " (nobody reported more)"
    times = [f"{cut.detect_s:.1f} s to notice"] if cut.detect_s else []
    if cut.again_s is not None:
        times.append(f"{cut.again_s:.1f} s to be training again")
    took = f"; {', '.join(times)}" if times else ""
    return f"{clock(ended.at)} {because}: {resumed}, {cost}{took}."


def cause(ended: Ended, node: str) -> str:
    """Return why an attempt ended, in words."""
    if ended.detail.startswith(_TRAINER):  # what it did says more than our name for it
        return f"{_TRAINER}on {node} {ended.detail.removeprefix(_TRAINER)}"
    if ended.reason is EndReason.SPOT_NOTICE and _NOTICE in ended.detail:
        kind, said = ended.detail.split(_NOTICE, 1)
        return f"{kind} notice on {node} ({said})"
    return _CAUSES[ended.reason].format(node=node)


def _quarantine(ref: CheckpointRef, reason: str) -> str:
    return f"The checkpoint of {ref} was set aside, and the one before it is used: {reason}."


def told(record: Record) -> str:
    """Return what a record says, in words; ``shown_line`` makes them safe to print."""
    match record.kind:
        case "claimed":
            return f"attempt {record.attempt} placed on {record.node}"
        case "started":
            return f"attempt {record.attempt} training, from step {record.step}"
        case "committed":
            final = " (final)" if record.final else ""
            size = sum(file.size_bytes for file in record.files)
            part = "" if record.resumable else " (adapter only)"
            return (
                f"step {record.step} committed by attempt {record.attempt}, {size / 1e6:.2f} MB{final}{part}"
            )
        case "ended":
            return f"attempt {record.attempt} ended at step {record.step}: {record.reason}, {record.detail}"
        case "retired":
            return f"retired {', '.join(str(ref) for ref in record.checkpoints)}"
        case "reaped":
            return f"deleted {', '.join(str(ref) for ref in record.checkpoints)}"
        case "quarantined":
            if record.attempt:
                return f"attempt {record.attempt} could not use {record.checkpoint}: {record.reason}"
            return f"set aside {record.checkpoint}: {record.reason}"
        case "pinned" | "unpinned":
            return f"{record.checkpoint} {record.kind} by hand"
        case "cancel_requested":
            return "cancelling was asked for"
        case "finished":
            return f"{record.outcome} at step {record.step}{': ' + record.detail if record.detail else ''}"
