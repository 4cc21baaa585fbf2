"""Which queued run goes to which free slot: one pure function."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedRun:
    """A run that may be launched."""

    run_id: str
    index: int
    """Position in the sweep."""
    committed_step: int = 0
    not_before: float = 0.0
    """By the clock of ``assign``."""
    avoid_node: str | None = None
    """Where its last attempt stalled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeSlot:
    """A place for one training process."""

    slot: str
    node: str
    up_since: float
    """When the node was first seen, in Unix seconds."""


@dataclass(frozen=True, slots=True)
class Placement:
    run_id: str
    slot: str
    node: str


def assign(runs: Sequence[QueuedRun], slots: Sequence[FreeSlot], now: float) -> list[Placement]:
    """Return placements, best first, at most one per run and per slot.

    Runs with committed work come first, so that few runs are half done; then sweep order. A run gets the node
    that has been up longest, because the hazard of a spot node falls with its age, except the one on which it
    just stalled, which it gets only if there is no other.
    """
    due = sorted(
        (r for r in runs if r.not_before <= now), key=lambda r: (r.committed_step == 0, r.index, r.run_id)
    )
    free = sorted(slots, key=lambda s: (s.up_since, s.node, s.slot))
    placements = []
    for run in due:
        if not free:
            break
        slot = next((s for s in free if s.node != run.avoid_node), free[0])
        free.remove(slot)
        placements.append(Placement(run.run_id, slot.slot, slot.node))
    return placements
