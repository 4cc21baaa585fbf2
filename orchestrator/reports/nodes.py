"""The nodes of a sweep as a person sees them, derived from what its controller thinks of their slots. Pure.

Without a controller the logs tell only which nodes run something, and the log of drains which are drained.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from storage.drains import Drains
from storage.redaction import printable
from storage.run_state import RunState

from ..control.placing import SlotNote, Standing

UP, DRAINING, DRAINED, SILENT, GONE, NOT_USED, UNSEEN = (
    "up",
    "draining",
    "drained",
    "silent",
    "gone",
    "not used",
    "not seen",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeView:
    """One row."""

    node: str
    state: str
    why: str
    slots: int
    busy: int
    runs: tuple[str, ...]
    up_since: float | None
    """Unix seconds, when its oldest agent came up."""
    silent_s: float
    """Since any of its slots was heard of."""
    up_mb_s: float | None = None
    """From it to the store, in MB/s, as it was last tried with a small object; None: it was not."""
    down_mb_s: float | None = None


def nodes(notes: Iterable[SlotNote], drains: Drains = Drains()) -> list[NodeView]:  # noqa: B008
    """Return a row per node, by name; drained nodes of which nothing is seen are rows too."""
    by_node: dict[str, list[SlotNote]] = {drain.node: [] for drain in drains.asked}
    for note in notes:
        by_node.setdefault(note.node, []).append(note)
    return [_view(node, slots, drains) for node, slots in sorted(by_node.items())]


def of_logs(states: Mapping[str, RunState], drains: Drains) -> list[NodeView]:
    """Return what the logs alone tell: a row per node that holds an attempt, or is drained."""
    notes = [
        SlotNote(
            slot=running.claimed.slot,
            node=running.claimed.node,
            up_since=running.claimed.at,
            standing=Standing.BUSY,
            run_id=run_id,
        )
        for run_id, state in states.items()
        if (running := state.running)
    ]
    return nodes(notes, drains)


def as_json(sweep: str, views: Iterable[NodeView], *, live: bool) -> dict[str, Any]:
    """Return the stable form of ``nodes -o json``."""
    return {"schema": 1, "sweep": sweep, "live": live, "nodes": [asdict(view) for view in views]}


def _view(node: str, notes: list[SlotNote], drains: Drains) -> NodeView:
    there = [note for note in notes if note.standing is not Standing.GONE]
    runs = tuple(note.run_id for note in there if note.run_id)
    state, why = _state(node, notes, there, drains, bool(runs))
    speeds = [note.speed for note in there if note.speed]
    return NodeView(
        node=printable(node),
        state=state,
        why=printable(why),
        slots=len(there),
        busy=len(runs),
        runs=runs,
        up_since=min((note.up_since for note in there if note.up_since), default=None),
        silent_s=min((note.silent_s for note in there), default=0.0),
        up_mb_s=max((round(speed.up / 1e6, 3) for speed in speeds), default=None),
        down_mb_s=max((round(speed.down / 1e6, 3) for speed in speeds), default=None),
    )


def _state(
    node: str, notes: list[SlotNote], there: list[SlotNote], drains: Drains, busy: bool
) -> tuple[str, str]:
    drain = drains.of(node)
    asked = f"by hand; attempts got {drain.grace_s:g} s to end" if drain else ""
    if notes and not there:
        return GONE, asked and f"drained {asked}"
    if drain:
        return (DRAINING if busy else DRAINED if there else UNSEEN), asked if there else f"drained {asked}"
    if all(note.standing is Standing.SILENT for note in there):
        return SILENT, "it may be training all the same"
    if barred := next((note for note in there if note.standing is Standing.BARRED), None):
        return NOT_USED, barred.detail
    if unheard := next((note.unheard for note in there if note.unheard), ""):
        return UP, f"notices of its end cannot be heard: {unheard}"
    return UP, ""
