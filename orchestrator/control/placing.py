"""Why a slot gets no run, and why a run gets no slot: the reasons beside ``scheduler.assign``, as values.

Pure. The controller decides by these and keeps what it decided by, so that ``explain`` and ``nodes`` say
exactly that, and not what a second opinion would be.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from storage.drains import Drains
from storage.records import EndReason
from storage.run_state import FREE_ENDS, RunState

from .cluster import Health, Slot, StoreSpeed
from .scheduler import Avoided, FreeSlot, QueuedRun, in_turn

NODE_AT_FAULT = (EndReason.STORAGE_DOWN, EndReason.HUB_DOWN, EndReason.DISK_FULL, EndReason.NODE_UNFIT)
"""Whatever the run has achieved there: what the next attempt needs may not be better there soon."""


class Standing(StrEnum):
    """What a slot can do for the sweep now."""

    FREE = "free"
    BUSY = "busy"
    DRAINED = "drained"
    """A person wants its node left alone."""
    BARRED = "barred"
    """Nothing is placed there for what its node does, or is about to."""
    SILENT = "silent"
    GONE = "gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotNote:
    """What is thought of a slot, and why."""

    slot: str
    node: str
    up_since: float
    standing: Standing
    detail: str = ""
    silent_s: float = 0.0
    run_id: str | None = None
    """The run that a claim gave it to, or that it trains."""
    last_choice: bool = False
    """Its node may be taken away sooner than others."""
    unheard: str = ""
    """Why its node could not hear a notice of its end."""
    speed: StoreSpeed | None = None
    """Between its node and the store."""
    let_off: bool = False
    """A notice of its node's end was withdrawn a moment ago."""


class Hold(StrEnum):
    """Why a queued run has no slot."""

    NOT_DUE = "NOT_DUE"
    NO_SLOT = "NO_SLOT"
    LIMIT = "LIMIT"
    """As many runs train as may at the same time."""
    OUTRANKED = "OUTRANKED"
    DRAINS_UNKNOWN = "DRAINS_UNKNOWN"
    LOG_UNREADABLE = "LOG_UNREADABLE"
    LOG_DAMAGED = "LOG_DAMAGED"
    NEXT = "NEXT"
    """There is a slot for it, and the next tick gives it that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What a controller thinks of one run."""

    hold: Hold | None = None
    """None: the run waits for nothing."""
    for_s: float = 0.0
    """With NOT_DUE: so long from now."""
    ahead: int = 0
    """With OUTRANKED: so many runs are to be placed before it."""
    free: int = 0
    """With OUTRANKED: on so many slots, no more than may train at the same time."""
    problem: str = ""
    """With LOG_UNREADABLE and LOG_DAMAGED."""
    slots: tuple[SlotNote, ...] = ()


def bar(slot: Slot, drains: Drains, ill: Mapping[str, str] | None = None) -> tuple[Standing, str] | None:
    """Return why nothing may be placed on a slot, whatever it does; None: it may.

    Args:
        ill: The slots that their node's reputation bars, and why.
    """
    if drains.of(slot.node):
        return Standing.DRAINED, "a person wants it left alone"
    if slot.ending:
        return Standing.BARRED, str(slot.notice)
    if slot.unfit:
        return Standing.BARRED, slot.unfit
    if ill and (because := ill.get(slot.slot)):
        return Standing.BARRED, because
    return None


def note(slot: Slot, barred: tuple[Standing, str] | None, claimed_by: str | None) -> SlotNote:
    """Return what is thought of a slot: the strongest reason against placing a run there."""
    busy = slot.work.run_id if slot.work and slot.work.exit_code is None else None
    run_id = claimed_by or busy
    standing, detail = (Standing.BUSY if run_id else Standing.FREE), ""
    if slot.health is Health.GONE:
        standing, detail = Standing.GONE, "with its node" if slot.node_lost else "its node lives"
        run_id = claimed_by
    elif slot.health is Health.UNKNOWN:
        standing, detail = Standing.SILENT, ""
    elif barred:
        standing, detail = barred
    elif not (run_id or slot.free):
        standing = Standing.BARRED
    return SlotNote(
        slot=slot.slot,
        node=slot.node,
        up_since=slot.up_since,
        standing=standing,
        detail=detail,
        silent_s=slot.silent_s,
        run_id=run_id,
        last_choice=slot.notice is not None,
        unheard=slot.unheard,
        speed=slot.speed,
        let_off=slot.ending and slot.notice is not None and slot.notice.withdrawn,
    )


def free_slots(notes: Sequence[SlotNote]) -> list[FreeSlot]:
    """The slots on which a run may be placed."""
    return [
        FreeSlot(slot=note.slot, node=note.node, up_since=note.up_since, last_choice=note.last_choice)
        for note in notes
        if note.standing is Standing.FREE
    ]


def unused(notes: Sequence[SlotNote]) -> frozenset[str]:
    """The slots that train nothing and get nothing: others may be opened in their place, and those that are
    gone may be forgotten."""
    kept_out = (Standing.DRAINED, Standing.BARRED, Standing.GONE)
    return frozenset(note.slot for note in notes if note.standing in kept_out and note.run_id is None)


def queued_run(run_id: str, index: int, state: RunState, not_before: float) -> QueuedRun:
    """Return a queued run as the scheduler sees it."""
    return QueuedRun(
        run_id=run_id,
        index=index,
        committed_step=state.committed_step,
        not_before=not_before,
        avoid=avoided(state),
    )


def avoided(state: RunState) -> Avoided | None:
    """The node to avoid: there the last attempt made no progress, or the node itself was at fault."""
    last = state.attempts[-1] if state.attempts else None
    if last is None or last.ended is None:
        return None
    node, reason = last.claimed.node, last.ended.reason
    if reason in NODE_AT_FAULT:
        return Avoided(node=node, because=f"its last attempt ended there with {reason}")
    if reason not in FREE_ENDS and last.committed_step is None:
        return Avoided(node=node, because="its last attempt stalled there")
    return None


def outlook(
    run: QueuedRun,
    queued: Sequence[QueuedRun],
    notes: tuple[SlotNote, ...],
    *,
    drains_known: bool,
    room: int | None,
    now: float,
) -> Outlook:
    """Return why a queued run has no slot.

    Args:
        queued: All runs that may be placed.
        room: So many may be placed now; None: as many as there are free slots.
        now: By the clock of ``assign``.
    """
    free = len(free_slots(notes))
    if room is not None:
        free = min(free, room)
    if not drains_known:
        return Outlook(hold=Hold.DRAINS_UNKNOWN, slots=notes)
    if run.not_before > now:
        return Outlook(hold=Hold.NOT_DUE, for_s=run.not_before - now, slots=notes)
    if room == 0:
        return Outlook(hold=Hold.LIMIT, slots=notes)
    if not free:
        return Outlook(hold=Hold.NO_SLOT, slots=notes)
    ahead = next((n for n, other in enumerate(in_turn(queued, now)) if other.run_id == run.run_id), 0)
    return Outlook(hold=Hold.OUTRANKED if ahead >= free else Hold.NEXT, ahead=ahead, free=free, slots=notes)


def claims(states: Mapping[str, RunState]) -> dict[str, str]:
    """The run that each slot was given to by a claim that stands, by slot."""
    return {state.running.claimed.slot: run_id for run_id, state in states.items() if state.running}
