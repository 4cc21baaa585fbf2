"""Which checkpoints may go. Pure: who retires and deletes them is decided elsewhere."""

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Literal

from .records import CheckpointRef, Committed


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
        kept |= {c.ref for c in _best(ordered, metric, maximize=goal == "maximize")[:keep_best]}
    return [c.ref for c in ordered if c.ref not in kept]


def _best(ordered: Iterable[Committed], metric: str, *, maximize: bool) -> list[Committed]:
    """Those with a number for the metric, best first, of equals the earlier first."""
    measured = [c for c in ordered if math.isfinite(c.metrics.get(metric, math.nan))]
    return sorted(measured, key=lambda c: -c.metrics[metric] if maximize else c.metrics[metric])
