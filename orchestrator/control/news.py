"""What the report of a slot means for the attempt that was given to it. Pure."""

from collections.abc import Mapping

from storage.drains import Drains
from storage.records import EndReason
from storage.run_state import RunState

from . import silence
from .cluster import Slot
from .lifecycle import Event, Exited, Lost
from .loss import loss


def news(
    run_id: str,
    state: RunState,
    slots: Mapping[str, Slot],
    sign: silence.Sign | None,
    drains: Drains,
    silence_s: float,
    *,
    at: float,
    now: float,
) -> Event | None:
    """Return what the slot's report means for a run's attempt; None: nothing has happened.

    Args:
        sign: The last one of life that the attempt gave by what it wrote.
        silence_s: The longest silence of a slot that may still live.
        at: Unix seconds, for the record.
        now: The tick's: who was heard of when it was decided whose logs to read is not found silent by
            how long the reading took.
    """
    if state.running is None:
        return None
    claimed = state.running.claimed
    slot = slots.get(claimed.slot)
    if slot is None:
        detail = f"{claimed.node} is not part of the cluster any more"
        return Lost(at=at, attempt=claimed.attempt, reason=EndReason.NODE_LOST, detail=detail)
    work = slot.work
    mine = work if work and (work.run_id, work.attempt) == (run_id, claimed.attempt) else None
    if mine and mine.exit_code is not None:
        return Exited(
            at=at,
            attempt=claimed.attempt,
            code=mine.exit_code,
            error=mine.error,
            evidence=mine.evidence,
            step=mine.step,
            step_s=mine.step_s,
            asked=mine.asked,
            drained=drains.of(slot.node) is not None,
            notice=str(mine.notice) if mine.notice else "",
            saved_s=mine.saved_s,
        )
    silent_s = silence.silent_s(slot.silent_s, sign, now)
    drained = drains.of(slot.node) is not None
    lost = loss(slot, silent_s, silence_s, drained=drained)
    if lost is None:
        return None
    reason, detail = lost
    return Lost(
        at=at,
        attempt=claimed.attempt,
        reason=reason,
        detail=detail,
        step=max(mine.step if mine else 0, state.committed_step),
        step_s=mine.step_s if mine else 0.0,
        silent_s=silent_s,
    )
