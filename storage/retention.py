"""Which checkpoints may go. Pure: who retires and deletes them is decided elsewhere."""

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Literal

from .records import CheckpointRef, Committed
from .run_state import RunState


def plan_prune(
    committed: Sequence[Committed],
    *,
    keep_last: int,
    keep_every: int = 0,
    keep_best: int = 0,
    metric: str | None = None,
    goal: Literal["minimize", "maximize"] | str = "minimize",
    pinned: Collection[CheckpointRef] = (),
) -> list[CheckpointRef]:
    """Return the checkpoints that may be retired, oldest first: never the newest, never a final one.

    Args:
        committed: The restorable checkpoints of one run.
        keep_last: How many of the newest stay.
        keep_every: Also keep steps divisible by this; 0: none.
        keep_best: Also keep this many with the best ``metric``, of equals the earlier. A checkpoint whose
            metric is missing or not a number is never among them.
        pinned: Never retired, e.g. the one a new attempt is resuming from.

    Raises:
        ValueError: ``keep_last`` is below 1, which would give up the only checkpoint that a preempted run can
            resume from; or best ones are to be kept without saying by which metric or towards which goal.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last must be at least 1, got {keep_last}: a preempted run resumes from one")
    if keep_every < 0 or keep_best < 0:
        raise ValueError(f"keep_every and keep_best must not be negative, got {keep_every} and {keep_best}")
    if goal not in ("minimize", "maximize"):
        raise ValueError(f"goal must be 'minimize' or 'maximize', got {goal!r}")
    ordered = sorted(committed, key=lambda c: (c.step, c.attempt))
    kept = {c.ref for c in ordered[-keep_last:]} | set(pinned)
    kept |= {c.ref for c in ordered if c.final or (keep_every and c.step % keep_every == 0)}
    if keep_best:
        if metric is None:
            raise ValueError("keep_best needs a metric to judge by")
        kept |= {c.ref for c in best_first(ordered, metric, maximize=goal == "maximize")[:keep_best]}
    return [c.ref for c in ordered if c.ref not in kept]


def plan_salvaged(state: RunState) -> list[CheckpointRef]:
    """Return the salvages that may be retired, oldest first.

    Of use is the newest alone, and only while no full checkpoint is as far. One of the attempt that runs is
    never given up: the attempt may yet commit the whole of it, under the same keys.
    """
    full = {c.ref for c in state.checkpoints}
    live = state.running.number if state.running else None
    ordered = sorted(state.salvaged, key=lambda c: (c.step, c.attempt))
    kept = {c.ref for c in ordered[-1:] if c.step > state.committed_step} | set(state.pinned) | full
    return [c.ref for c in ordered if c.ref not in kept and c.attempt != live]


def resumed_from(state: RunState) -> list[CheckpointRef]:
    """Return what the attempt that runs has resumed from, and may still be reading."""
    running = state.running
    return [c.ref for c in state.checkpoints if running and c.step == running.resumed_from]


def best_first(ordered: Iterable[Committed], metric: str, *, maximize: bool) -> list[Committed]:
    """Return those with a number for the metric, best first, of equals the earlier first."""
    measured = [c for c in ordered if math.isfinite(c.metrics.get(metric, math.nan))]
    return sorted(measured, key=lambda c: -c.metrics[metric] if maximize else c.metrics[metric])
