"""Which queued run goes to which free slot, and why there: pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Avoided:
    """A node that a run should not get again so soon."""

    node: str
    because: str


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedRun:
    """A run that may be launched."""

    run_id: str
    index: int
    """Position in the sweep."""
    committed_step: int = 0
    not_before: float = 0.0
    """By the clock of ``assign``."""
    avoid: Avoided | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeSlot:
    """A place for one training process."""

    slot: str
    node: str
    up_since: float
    """When the node was first seen, in Unix seconds."""
    last_choice: bool = False
    """Its node may be taken away sooner than others."""


@dataclass(frozen=True, slots=True)
class Placement:
    run_id: str
    slot: str
    node: str
    because: str = field(default="", compare=False)


def assign(
    runs: Sequence[QueuedRun], slots: Sequence[FreeSlot], now: float, *, room: int | None = None
) -> list[Placement]:
    """Return placements, best first, at most one per run and per slot, and at most ``room``.

    A run gets the node that has been up longest, because the hazard of a spot node falls with its age, except
    the one that it avoids, which it gets only if there is no other. What is a last choice comes after all.
    """
    free = sorted(slots, key=lambda s: (s.last_choice, s.up_since, s.node, s.slot))
    placements: list[Placement] = []
    for run in in_turn(runs, now):
        if not free or len(placements) == room:
            break
        avoid = run.avoid.node if run.avoid else None
        slot = next((s for s in free if s.node != avoid), free[0])
        placements.append(Placement(run.run_id, slot.slot, slot.node, _because(run.avoid, slot, free)))
        free.remove(slot)
    return placements


def in_turn(runs: Sequence[QueuedRun], now: float) -> list[QueuedRun]:
    """Return the runs that are due, in the order in which they get slots.

    Runs with committed work come first, so that few runs are half done; then sweep order.
    """
    due = (r for r in runs if r.not_before <= now)
    return sorted(due, key=lambda r: (r.committed_step == 0, r.index, r.run_id))


def _because(avoid: Avoided | None, slot: FreeSlot, free: Sequence[FreeSlot]) -> str:
    """Why the run got this one of the free slots, oldest first."""
    others = "the only free slot" if len(free) == 1 else f"up longest of {len(free)} free slots"
    if avoid is None:
        return others
    if slot.node == avoid.node:
        return f"no slot was free on another node, although {avoid.because}"
    if free[0].node == avoid.node:
        return f"up longest of the free slots that are not on {avoid.node}: {avoid.because}"
    return others
