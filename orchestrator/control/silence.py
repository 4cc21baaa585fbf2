"""What a run's log says about a slot that is not heard of: an attempt that still commits is alive.

A slot may be out of the cluster's reach, or its agent too busy to answer, while it trains on and reaches the
store. So what counts is how long neither was heard of. When a record was written does not matter, only when
we first saw it: nodes' clocks may be anything.
"""

import math
from dataclasses import dataclass, replace

from storage.records import CheckpointRef
from storage.run_state import RunState


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign:
    """What the running attempt has written of itself so far, and when that was first seen to have grown."""

    attempt: int
    started: bool
    committed_step: int | None
    salvaged: tuple[CheckpointRef, ...]
    seen_at: float = -math.inf
    """By the reader's monotonic clock. What was there at the first look may be old."""


def look(before: Sign | None, state: RunState, now: float) -> Sign | None:
    """Return the sign as of a reading of the log at ``now``; None while nothing runs."""
    running = state.running
    if running is None:
        return None
    seen_at = before.seen_at if before and before.attempt == running.number else -math.inf
    found = Sign(
        attempt=running.number,
        started=running.started is not None,
        committed_step=running.committed_step,
        salvaged=tuple(c.ref for c in state.salvaged if c.attempt == running.number),
        seen_at=seen_at,
    )
    if before is None or before.attempt != found.attempt or before == found:
        return found
    return replace(found, seen_at=now)


def silent_s(slot_silent_s: float, sign: Sign | None, now: float) -> float:
    """Return for how long neither the slot nor its attempt's commits were heard of.

    Args:
        now: When the slot was looked at; a commit may have been seen since.
    """
    return slot_silent_s if sign is None else max(0.0, min(slot_silent_s, now - sign.seen_at))
