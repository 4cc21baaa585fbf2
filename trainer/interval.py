"""How long a run may train between two checkpoints: pure.

The work that is lost with a node is half an interval on average, so the interval that costs least is
sqrt(2 × cost of a checkpoint / hazard). The hazard is that of the node *now*: machines that are rented by the
second die young, and those that have survived go on surviving (a Weibull distribution with a shape below 1),
so a fresh node saves often and an old one seldom. Below 30 s, or the time that an upload takes, nothing is
gained.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from storage.records import EndReason
from storage.run_state import RunState

from .config import Frozen

MIN_S = 30.0
"""More often than this the gain is noise."""
UNMEASURED = "no checkpoint is measured yet"
MAX_S = 600.0
"""The most that ``checkpoint.every: auto`` loses by default."""
YOUNGEST_S = 60.0
"""Age below which a node counts as this old: the hazard of a newborn is infinite."""
PRIOR_LOSSES = 4.0
"""How many observed losses the prior is worth: a few unlucky nodes must not swing the estimate."""

LOSSES = frozenset({EndReason.NODE_LOST, EndReason.NODE_UNREACHABLE, EndReason.SPOT_NOTICE})
"""Ends of an attempt that were the end of its node."""


class Lifetimes(Frozen):
    """How long nodes live. The defaults are those of one cloud's spot GPUs, over nine zones."""

    shape: Annotated[float, Field(gt=0)] = 0.6
    scale_s: Annotated[float, Field(gt=0)] = 105 * 60.0
    losses: Annotated[int, Field(ge=0)] = 0
    """How many losses of nodes the scale has learned from."""

    def hazard(self, age_s: float) -> float:
        """The chance per second that a node of this age is lost."""
        age_s = max(age_s, YOUNGEST_S)
        return float(self.shape / self.scale_s * (age_s / self.scale_s) ** (self.shape - 1))


@dataclass(frozen=True, slots=True)
class Life:
    """What was seen of one node."""

    seconds: float
    lost: bool
    """Else it lived on, or went for a reason of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Seconds between checkpoints, and why."""

    every_s: float
    why: str


def choose(
    lifetimes: Lifetimes,
    *,
    age_s: float,
    cost_s: float | None,
    upload_s: float | None,
    max_s: float = MAX_S,
) -> Interval:
    """Return the interval for a node of this age.

    Args:
        cost_s: What a checkpoint costs in training time: the stall, and what writing it slows steps down.
            None: not measured yet.
        upload_s: How long it takes to reach the store; None: not measured yet.
        max_s: The most that one loss may cost, unless an upload takes longer.
    """
    floor_s = max(MIN_S, upload_s or 0.0)
    if cost_s is None:
        return Interval(every_s=floor_s, why=UNMEASURED)
    mean_s = 1 / lifetimes.hazard(age_s)
    ideal_s = math.sqrt(2 * max(cost_s, 0.0) * mean_s)
    every_s = max(floor_s, min(ideal_s, max_s))
    said = f"a node {shown(age_s)} old is lost once in {shown(mean_s)} ({_source(lifetimes)})"
    said += f", a checkpoint costs {cost_s * 1000:.0f} ms"
    if every_s == ideal_s:
        return Interval(every_s=every_s, why=said)
    if every_s > ideal_s:
        slow = upload_s is not None and upload_s >= MIN_S
        bound = f"its upload takes {shown(upload_s or 0.0)}" if slow else f"never below {shown(MIN_S)}"
    else:
        bound = f"at most {shown(max_s)}"
    return Interval(every_s=every_s, why=f"{said}: {shown(ideal_s)} would be best, {bound}")


def learned(lives: Iterable[Life]) -> Lifetimes:
    """Return the lifetimes after these lives: exactly what Bayes says of the scale, with the shape as it is.

    The rate scale^-shape has a gamma prior that is worth ``PRIOR_LOSSES``. Lives that were not seen to end
    count for as long as they lasted.
    """
    prior = Lifetimes()
    losses, exposure = 0, 0.0
    for life in lives:
        losses += life.lost
        exposure += max(life.seconds, 0.0) ** prior.shape
    weight = PRIOR_LOSSES + losses
    scale_s = ((PRIOR_LOSSES * prior.scale_s**prior.shape + exposure) / weight) ** (1 / prior.shape)
    return Lifetimes(shape=prior.shape, scale_s=scale_s, losses=prior.losses + losses)


def lives(states: Iterable[RunState], now: float) -> list[Life]:
    """Return what the logs of a sweep tell of its nodes: from a node's first claim to its loss, or till now.

    A node that is claimed again after it was lost is another one of that name.
    """
    attempts = [attempt for state in states for attempt in state.attempts]
    open_lives: dict[str, tuple[float, float]] = {}
    found: list[Life] = []
    events: list[tuple[float, int, str, bool]] = []
    for attempt in attempts:
        node, ended = attempt.claimed.node, attempt.ended
        events.append((attempt.claimed.at, 1, node, False))
        if ended:
            events.append((ended.at - ended.silent_s, 0, node, ended.reason in LOSSES))
        else:
            events.append((now, 0, node, False))
    for at, is_claim, node, lost in sorted(events):
        first, last = open_lives.get(node, (at, at))
        if lost:
            if node in open_lives:  # of several attempts that end with a node, the first tells of it
                found.append(Life(max(at - first, 0.0), True))
                del open_lives[node]
        elif node in open_lives or is_claim:
            open_lives[node] = (first, max(last, at))
    return [*found, *(Life(last - first, False) for first, last in open_lives.values())]


def shown(seconds: float) -> str:
    """A duration in one or two units."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 100:
        return f"{minutes:.0f} min"
    hours = minutes / 60
    return f"{hours:.0f} h" if hours < 100 else f"{hours / 24:.0f} d"


def _source(lifetimes: Lifetimes) -> str:
    if not lifetimes.losses:
        return "no loss seen yet"
    return f"{lifetimes.losses} loss{'es' if lifetimes.losses > 1 else ''} seen"
