"""What a sweep's attempts came to, in numbers for a dashboard: a fold of the runs' states. Pure.

``goodput`` is preserved training time by allocated time: of an attempt, the time from its first step to its
last committed checkpoint counts, of the time from its claim to its end. Times are those of whoever wrote the
records, so a clock that is wrong bends the ratio, and never beyond 0 and 1.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from storage.records import EndReason
from storage.run_state import Attempt, RunState

from .why import interruptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Totals, by why attempts ended: one of ``EndReason``, or the run's outcome that ended it too."""

    ends: Counter[str] = field(default_factory=Counter)
    lost_steps: Counter[str] = field(default_factory=Counter)
    lost_s: dict[str, float] = field(default_factory=dict)
    notices: Counter[str] = field(default_factory=Counter)
    """``saved``: nothing was lost; ``late``: something was."""


def tally(state: RunState) -> Tally:
    """Return what one run's attempts came to so far."""
    found = Tally()
    for cut in interruptions(state):
        assert cut.attempt.ended
        reason = cut.attempt.ended.reason
        found.ends[reason] += 1
        found.lost_steps[reason] += cut.lost_steps
        found.lost_s[reason] = found.lost_s.get(reason, 0.0) + cut.lost_s
        if reason is EndReason.SPOT_NOTICE:
            found.notices["late" if cut.lost_steps else "saved"] += 1
    if state.finished and state.attempts and state.attempts[-1].ended is None:
        found.ends[state.finished.outcome] += 1
    return found


def added(now: Tally, before: Tally) -> Tally:
    """Return what was added since. A loss that turned out smaller takes nothing back."""
    return Tally(
        ends=now.ends - before.ends,
        lost_steps=now.lost_steps - before.lost_steps,
        lost_s={r: s - b for r, s in now.lost_s.items() if s > (b := before.lost_s.get(r, 0.0))},
        notices=now.notices - before.notices,
    )


def goodput(states: Mapping[str, RunState], now: float) -> float | None:
    """Return preserved training time by allocated time; None if nothing was allocated."""
    productive_s = allocated_s = 0.0
    for attempt, allocated in _allocated(states, now):
        allocated_s += allocated
        if attempt.started and attempt.committed_at is not None:
            preserved = attempt.committed_at - attempt.started.at
            productive_s += min(max(0.0, preserved), allocated)
    return productive_s / allocated_s if allocated_s else None


def spent_usd(states: Mapping[str, RunState], now: float, price_per_hour: float) -> float:
    """Return what the time allocated to attempts has cost so far; that of idle nodes is nobody's here."""
    return sum(allocated for _, allocated in _allocated(states, now)) / 3600.0 * price_per_hour


def _allocated(states: Mapping[str, RunState], now: float) -> Iterator[tuple[Attempt, float]]:
    """Every attempt, with the seconds from its claim to its end, or until now."""
    for state in states.values():
        for attempt in state.attempts:
            end = attempt.ended or state.finished
            yield attempt, max(0.0, (end.at if end else now) - attempt.claimed.at)
