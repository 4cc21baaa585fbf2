"""What a run's log means, as three pure functions: ``fold``, ``refusal`` and ``holds``.

    state = reduce(fold, entries, RunState())
    refusal(state, record) is None   <=>   the record may be appended next
    holds(state, record)             <=>   this very fact is already in the log: appending it again is a no-op

The attempt number is the fence: a record of an attempt that is not the newest claimed one, or whose end is
already recorded, is refused. Both functions see records in log order only; no clock takes part.
"""

from dataclasses import dataclass, replace
from typing import assert_never

from .records import (
    CancelRequested,
    CheckpointRef,
    Claimed,
    Committed,
    Ended,
    EndReason,
    Finished,
    Outcome,
    Pinned,
    Quarantined,
    Reaped,
    Record,
    Retired,
    RunEntry,
    Started,
    Unpinned,
)

FREE_ENDS = frozenset(
    {
        EndReason.SPOT_NOTICE,
        EndReason.NODE_LOST,
        EndReason.NODE_UNREACHABLE,
        EndReason.SUPERSEDED,
        EndReason.DRAINED,
        EndReason.STORAGE_DOWN,
        EndReason.HUB_DOWN,
        EndReason.NODE_UNFIT,
    }
)
"""Ends that say nothing about the run: the machine went, or its way to the store or the hub. Never stalls.

An agent that died while its node lives is not among them: a run that takes all memory ends so.
"""
UNHEARD_ENDS = frozenset({EndReason.NODE_LOST, EndReason.NODE_UNREACHABLE, EndReason.AGENT_LOST})
"""Ends that nobody reported: what the attempt did last is not known, and it may not even have ended."""

WITNESSES = 3
"""So many attempts must have found the only restorable checkpoint unusable, if all ran on one node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One claim of the run and what became of it."""

    claimed: Claimed
    resumed_from: int = 0
    """The newest restorable step when the attempt was claimed."""
    started: Started | None = None
    committed_step: int | None = None
    """The last step that this attempt committed."""
    committed_at: float | None = None
    """When, by its own clock."""
    refused: CheckpointRef | None = None
    """The checkpoint that this attempt could not use."""
    ended: Ended | None = None

    @property
    def number(self) -> int:
        return self.claimed.attempt


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """A run, as its log tells it. The empty state is a run that was never claimed."""

    attempts: tuple[Attempt, ...] = ()
    checkpoints: tuple[Committed, ...] = ()
    """Restorable: committed, neither retired nor quarantined; oldest first."""
    salvaged: tuple[Committed, ...] = ()
    """Adapters without optimizer state: good to export, never to resume from; oldest first. One whose whole
    checkpoint is committed later by the same attempt becomes part of that."""
    retired: tuple[Committed, ...] = ()
    """Retired, data possibly still there."""
    pinned: tuple[CheckpointRef, ...] = ()
    """Never retired while they are here."""
    quarantined: tuple[tuple[CheckpointRef, str], ...] = ()
    stalls: int = 0
    """Consecutive attempts that ended through no machine's fault without a new committed step."""
    fruitless: int = 0
    """Consecutive attempts that ended without a new committed step, through whosever fault."""
    cancel_requested: bool = False
    finished: Finished | None = None

    @property
    def attempt(self) -> int:
        """The newest claimed attempt's number; 0 before the first."""
        return self.attempts[-1].number if self.attempts else 0

    @property
    def running(self) -> Attempt | None:
        """The attempt that may append now, if there is one."""
        if self.finished or not self.attempts or self.attempts[-1].ended:
            return None
        return self.attempts[-1]

    @property
    def newest(self) -> Committed | None:
        """The checkpoint that a new attempt resumes from."""
        return self.checkpoints[-1] if self.checkpoints else None

    @property
    def committed_step(self) -> int:
        return self.newest.step if self.newest else 0

    @property
    def result(self) -> Committed | None:
        """The final checkpoint, once there is one."""
        return self.newest if self.newest and self.newest.final else None

    @property
    def outcome(self) -> Outcome | None:
        return self.finished.outcome if self.finished else None

    @property
    def stored(self) -> tuple[Committed, ...]:
        """Every checkpoint whose files may be relied on, to resume from or to export; oldest first."""
        return tuple(sorted((*self.checkpoints, *self.salvaged), key=lambda c: (c.step, c.attempt)))

    def restorable(self, ref: CheckpointRef) -> Committed | None:
        return next((c for c in self.checkpoints if c.ref == ref), None)


def fold(state: RunState, entry: RunEntry) -> RunState:
    """Return the state after one more entry; a record that ``refusal`` would have refused changes nothing."""
    return state if refusal(state, entry.record) else apply(state, entry.record)


def apply(state: RunState, record: Record) -> RunState:
    """Return the state after an admitted record."""
    match record:
        case Claimed():
            attempt = Attempt(claimed=record, resumed_from=state.committed_step)
            return replace(state, attempts=(*state.attempts, attempt))
        case Started():
            return _on_last_attempt(state, started=record)
        case Committed(resumable=False):
            return replace(state, salvaged=(*state.salvaged, record))
        case Committed():
            return replace(
                _on_last_attempt(state, committed_step=record.step, committed_at=record.at),
                checkpoints=(*state.checkpoints, record),
                salvaged=tuple(c for c in state.salvaged if c.ref != record.ref),  # it is part of this one
                stalls=0,
                fruitless=0,
            )
        case Ended():
            fruitless = state.attempts[-1].committed_step is None
            return replace(
                _on_last_attempt(state, ended=record),
                stalls=state.stalls + (fruitless and record.reason not in FREE_ENDS),
                fruitless=state.fruitless + fruitless,
            )
        case Retired(checkpoints=refs):
            gone = tuple(c for c in state.stored if c.ref in refs)
            kept = tuple(c for c in state.checkpoints if c.ref not in refs)
            salvaged = tuple(c for c in state.salvaged if c.ref not in refs)
            return replace(state, checkpoints=kept, salvaged=salvaged, retired=(*state.retired, *gone))
        case Reaped(checkpoints=refs):
            return replace(state, retired=tuple(c for c in state.retired if c.ref not in refs))
        case Quarantined(checkpoint=ref, attempt=attempt, reason=reason):
            if attempt is not None:
                state = _on_last_attempt(state, refused=ref)
                if not _believed(state, ref):
                    return state
            # Its data stays for inspection until the run is over, but nothing resolves to it.
            kept = tuple(c for c in state.checkpoints if c.ref != ref)
            return replace(state, checkpoints=kept, quarantined=(*state.quarantined, (ref, reason)))
        case Pinned(checkpoint=ref):
            return replace(state, pinned=(*state.pinned, ref))
        case Unpinned(checkpoint=ref):
            return replace(state, pinned=tuple(known for known in state.pinned if known != ref))
        case CancelRequested():
            return replace(state, cancel_requested=True)
        case Finished():
            return replace(state, finished=record)
        case _:
            assert_never(record)


def refusal(state: RunState, record: Record) -> str | None:
    """Say why the record may not be appended in this state, or None if it may."""
    match record:
        case Retired(checkpoints=refs):
            return _refuse_retiring(state, refs)
        case Reaped(checkpoints=refs):
            known = {c.ref for c in state.retired}
            missing = [str(ref) for ref in refs if ref not in known]
            return f"not retired: {', '.join(missing)}" if missing else None
        case Pinned(checkpoint=ref):
            if ref in state.pinned:
                return f"{ref} is pinned already"
            return None if any(c.ref == ref for c in state.stored) else f"{ref} is not there (any more)"
        case Unpinned(checkpoint=ref):
            return None if ref in state.pinned else f"{ref} is not pinned"
    if state.finished:
        return f"the run is over: {state.finished.outcome}"
    match record:
        case Claimed(attempt=attempt):
            if state.running:
                return f"attempt {state.attempt} is still running"
            if attempt != state.attempt + 1:
                return f"attempt {state.attempt} is the newest, so the next is not {attempt}"
            return "the run is to be cancelled" if state.cancel_requested else None
        case Started(attempt=attempt) | Ended(attempt=attempt):
            return _refuse_attempt(state, attempt)
        case Committed(attempt=attempt, incarnation=incarnation, step=step, final=final):
            fenced = _refuse_attempt(state, attempt)
            if fenced:
                return fenced
            if incarnation != state.attempts[-1].claimed.incarnation:
                return f"attempt {attempt} was claimed by another incarnation"
            # A run that is stopped in its last evaluation saves its last step: the final one of the next
            # attempt is of the same. Within one attempt both would have the same keys.
            if (step, final) <= (state.committed_step, bool(state.result)) or state.restorable(record.ref):
                return f"step {state.committed_step} is already committed"
            if state.result:
                return f"the final checkpoint, of step {state.result.step}, is already committed"
            if any(ref == record.ref for ref, _ in state.quarantined):
                return f"{record.ref} is quarantined"  # and could not be given up once more
            if any(c.ref == record.ref for c in state.retired):
                return f"{record.ref} is retired"  # reaping it would take this one's data too
            salvage = next((c for c in state.salvaged if c.ref == record.ref), None)
            if salvage and (not record.resumable or not contains(record, salvage)):
                return f"other files of step {step} are already committed"
            return None
        case Quarantined(checkpoint=ref, attempt=attempt):
            fenced = _refuse_attempt(state, attempt) if attempt is not None else None
            if fenced:
                return fenced
            if attempt is not None and (before := state.attempts[-1].refused):
                # A node that finds everything damaged is more likely to be the damage.
                return f"attempt {attempt} has refused {before} already"
            return None if state.restorable(ref) else f"{ref} is not restorable any more"
        case CancelRequested():
            return "cancelling was requested before" if state.cancel_requested else None
        case Finished():
            return None
        case _:
            assert_never(record)


def holds(state: RunState, record: Record) -> bool:
    """Say whether the log already has this fact.

    A writer that lost the reply to an append, and gave up, states its fact again later: that must neither
    write it twice nor count as being fenced. ``at`` does not take part: the second try has a later clock.
    """
    match record:
        case Committed():
            return any(
                c.ref == record.ref
                and c.incarnation == record.incarnation
                and c.final >= record.final
                and contains(c, record)
                and (contains(record, c) or not record.resumable)
                for c in (*state.stored, *state.retired)
            )
        case Started(attempt=attempt):
            return any(a.number == attempt and a.started is not None for a in state.attempts)
        case Ended(attempt=attempt):
            return any(a.number == attempt and a.ended is not None for a in state.attempts)
        case Quarantined(checkpoint=ref, attempt=attempt):
            said = any(a.number == attempt and a.refused == ref for a in state.attempts)
            return said or any(known == ref for known, _ in state.quarantined)
        case Claimed(attempt=attempt, incarnation=incarnation):
            return any(a.number == attempt and a.claimed.incarnation == incarnation for a in state.attempts)
        case Pinned(checkpoint=ref):
            return ref in state.pinned
        case Unpinned():
            return False
        case CancelRequested():
            return state.cancel_requested
        case Finished(outcome=outcome):
            return state.outcome == outcome
        case Retired(checkpoints=refs):
            return set(refs) <= {c.ref for c in state.retired}
        case Reaped():
            return False
        case _:
            assert_never(record)


def contains(whole: Committed, part: Committed) -> bool:
    """Whether each file of ``part`` is one of ``whole``, by name and content: how it lies in the store is
    another matter."""
    there = {(f.name, f.size_bytes, f.sha256) for f in whole.files}
    return (whole.resumable or not part.resumable) and all(
        (f.name, f.size_bytes, f.sha256) in there for f in part.files
    )


def _refuse_attempt(state: RunState, attempt: int) -> str | None:
    if attempt != state.attempt:
        return f"attempt {state.attempt} is the newest, attempt {attempt} is fenced"
    if state.running is None:
        return f"attempt {attempt} has ended"
    return None


def _believed(state: RunState, ref: CheckpointRef) -> bool:
    """Whether a checkpoint that the last attempt could not use is to be given up.

    Without the only one the run begins anew: that takes the word of two nodes, or, where there is no other
    node, of ``WITNESSES`` attempts.
    """
    nodes = [a.claimed.node for a in state.attempts if a.refused == ref]
    return len(state.checkpoints) > 1 or len(set(nodes)) > 1 or len(nodes) >= WITNESSES


def _refuse_retiring(state: RunState, refs: tuple[CheckpointRef, ...]) -> str | None:
    if state.newest and state.newest.ref in refs:
        return f"{state.newest.ref} is the newest checkpoint"
    running = state.running.number if state.running else None
    for salvage in state.salvaged:
        if salvage.ref in refs and salvage.attempt == running and salvage.step > state.committed_step:
            return f"attempt {running} may still complete {salvage.ref}"
    if pinned := [str(ref) for ref in refs if ref in state.pinned]:
        return f"pinned: {', '.join(pinned)}"
    there = {c.ref for c in state.stored}
    missing = [str(ref) for ref in refs if ref not in there]
    return f"not restorable: {', '.join(missing)}" if missing else None


def _on_last_attempt(state: RunState, **changes: object) -> RunState:
    *older, last = state.attempts
    return replace(state, attempts=(*older, replace(last, **changes)))  # type: ignore[arg-type]
