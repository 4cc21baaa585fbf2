"""What of a store may go, and why. Pure: ``collecting`` reads and deletes.

Nothing goes that a run could still need: its newest checkpoint, its result, what is pinned, what a live
attempt resumed from, the best by the sweep's metric, what policy keeps. The rest goes by four rules:

* a *superseded* checkpoint is retired in the log, which refuses it if it became one of those meanwhile;
* a *retired* one is deleted once its record is ``grace_s`` old, by the store's clock alone: when the store
  says that it wrote the record, against what it says the time is. No writer's and no reader's clock takes
  part, and only comfort depends on the grace: a reader whose files go reads the log again and takes what it
  says;
* an *orphan*, data of an attempt that is fenced, which no record names, goes at once. It can never be
  committed, so no clock is asked; nor for the uploads in parts that such an attempt never completed;
* what has no log (probes, uploads of no run, old terms) goes once it is so old, by the store's clock, that
  whoever wrote it is done.

What a rule condemns stays condemned, or the log refuses it. So a plan never expires, two may be carried out
at once, and one that was cut off is finished by the next.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from .. import layout
from ..object_store import ObjectInfo
from ..records import (
    CheckpointRef,
    Committed,
    Retired,
    RunEntry,
)
from ..retention import (
    best_first,
    plan_prune,
    plan_salvaged,
    resumed_from,
)
from ..run_state import RunState
from .inventory import Inventory, RunObjects, written_s

GRACE_S = 3600.0
"""Of what no sweep says it: probes, content."""
ABANDONED_S = 86_400.0
"""An upload of no run, and a term of a controller, are over after this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """What a policy keeps of each run, beside what is always kept."""

    last: int = 2
    every: int = 0
    best: int = 1
    metric: str | None = None
    maximize: bool = False

    def marks(self, state: RunState) -> dict[CheckpointRef, tuple[str, ...]]:
        """Return why each checkpoint that stays does so, in words."""
        reasons: dict[CheckpointRef, list[str]] = {c.ref: [] for c in state.stored}

        def mark(checkpoints: Iterable[CheckpointRef], word: str) -> None:
            for ref in checkpoints:
                if ref in reasons:
                    reasons[ref].append(word)

        mark([c.ref for c in state.checkpoints if c.final], "final")
        mark([state.newest.ref] if state.newest else [], "newest")
        mark([c.ref for c in state.checkpoints[-self.last : -1]], "keep_last")
        mark(self._best(state), "best")
        mark(state.pinned, "pinned")
        mark(resumed_from(state), "resumed from")
        mark([c.ref for c in state.checkpoints if self.every and c.step % self.every == 0], "milestone")
        salvaged, superfluous = {c.ref for c in state.salvaged}, plan_salvaged(state)
        mark([ref for ref in salvaged if ref not in superfluous], "salvage")
        return {ref: tuple(dict.fromkeys(words)) for ref, words in reasons.items() if words}

    def superseded(self, state: RunState) -> list[CheckpointRef]:
        """Return what may be retired of a run, oldest first."""
        full = plan_prune(
            state.checkpoints,
            keep_last=self.last,
            keep_every=self.every,
            keep_best=self.best if self.metric else 0,
            metric=self.metric,
            goal="maximize" if self.maximize else "minimize",
            pinned=(*state.pinned, *resumed_from(state)),
        )
        return [*full, *plan_salvaged(state)]

    def _best(self, state: RunState) -> list[CheckpointRef]:
        if not self.metric:
            return []
        ordered = sorted(state.checkpoints, key=lambda c: (c.step, c.attempt))
        return [c.ref for c in best_first(ordered, self.metric, maximize=self.maximize)[: self.best]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Doomed:
    """A checkpoint that goes, with what of it lies in the store."""

    checkpoint: Committed
    sized: tuple[tuple[str, int], ...]
    """Key and bytes of each object."""

    @property
    def size_bytes(self) -> int:
        return sum(size for _, size in self.sized)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """What goes of one run."""

    run: str
    keep: Keep | None
    """What its sweep's policy keeps; None: the run is of no sweep, and nothing of it is superseded."""
    grace_s: float = GRACE_S
    kept: Mapping[CheckpointRef, tuple[str, ...]] = field(default_factory=dict)
    retire: tuple[Doomed, ...] = ()
    reap: tuple[Doomed, ...] = ()
    waiting: tuple[Doomed, ...] = ()
    """Retired, and not for long enough."""
    orphans: tuple[ObjectInfo, ...] = ()
    uploads: tuple[str, ...] = ()
    """Unfinished uploads go under these prefixes: one each."""
    unfinished: int = 0

    @property
    def work(self) -> bool:
        """Whether anything is to be done."""
        return bool(self.retire or self.reap or self.orphans or self.uploads)


def plan_run(
    run: str,
    objects: RunObjects,
    state: RunState,
    entries: Sequence[RunEntry],
    *,
    keep: Keep | None,
    grace_s: float,
    now_s: float | None,
) -> RunPlan:
    """Return what goes of a run.

    Args:
        objects: From a listing of any moment.
        entries: The log's. A run without retired checkpoints needs none.
        now_s: What the store's clock says; None: it does not tell, so nothing is old enough.
    """
    if keep and state.finished is None:
        keep = replace(keep, last=max(keep.last, 2))  # of a run that goes on, one may turn out damaged
    named = _named(run, state.stored)
    sizes = {info.key: info.size_bytes for info in objects.data}
    retired = [_doomed(run, c, sizes, spared=named) for c in state.retired]
    seqs = _retired_at(entries)
    ripe = {
        c.ref
        for c in state.retired
        if old_enough(written_s(objects.log, seqs.get(c.ref, -1)), grace_s, now_s)
    }
    superseded = keep.superseded(state) if keep else []
    fenced = _fenced_prefixes(run, state, objects.unfinished)
    return RunPlan(
        run=run,
        keep=keep,
        grace_s=grace_s,
        kept=keep.marks(state) if keep else {},
        retire=tuple(
            _doomed(run, c, sizes, spared=frozenset()) for c in state.stored if c.ref in set(superseded)
        ),
        reap=tuple(d for d in retired if d.checkpoint.ref in ripe),
        waiting=tuple(d for d in retired if d.checkpoint.ref not in ripe),
        orphans=orphans(run, state, objects.data),
        uploads=fenced,
        unfinished=sum(1 for info in objects.unfinished if info.key.startswith(fenced)),
    )


def orphans(run: str, state: RunState, data: Iterable[ObjectInfo]) -> tuple[ObjectInfo, ...]:
    """Return the data that no record names and none ever can.

    That is of attempts older than the newest claim and, once the run is over, of that one too, and of
    quarantined checkpoints, which until then stay for inspection, and for as long as they are pinned: a
    person's wish outweighs a node's word. Data of an attempt that the log does not know yet is left alone.
    """
    named = _named(run, (*state.stored, *state.retired))
    inspected = () if state.finished else (ref for ref, _ in state.quarantined)
    spared = frozenset((*state.pinned, *inspected))
    below = state.attempt + bool(state.finished)
    return tuple(
        info
        for info in data
        if (key := layout.parse_data(info.key))
        and key.run == run
        and key.attempt < below
        and info.key not in named
        and key.ref not in spared
    )


def leftovers(inventory: Inventory, now_s: float | None) -> tuple[tuple[ObjectInfo, ...], ...]:
    """Return what goes of that which belongs to no run: probes, terms, unfinished uploads.

    A sweep's newest term stays, for its number is what the next controller's follows from.
    """
    probes = [info for info in inventory.probes if old_enough(info.modified_s, GRACE_S, now_s)]
    terms = []
    for sweep, infos in inventory.sweeps.items():
        numbered = [i for i in infos if layout.parse_log_entry(layout.terms_prefix(sweep), i.key) is not None]
        older = sorted(numbered, key=lambda info: info.key)[:-1]
        terms += [info for info in older if old_enough(info.modified_s, ABANDONED_S, now_s)]
    uploads = [i for i in inventory.stray_uploads if old_enough(i.modified_s, ABANDONED_S, now_s)]
    return tuple(probes), tuple(terms), tuple(uploads)


def old_enough(written: float | None, grace_s: float, now_s: float | None) -> bool:
    """Whether the store wrote something at least ``grace_s`` ago. Both times are by the store's clock."""
    if grace_s <= 0:
        return True
    return written is not None and now_s is not None and now_s - written >= grace_s


def _retired_at(entries: Sequence[RunEntry]) -> dict[CheckpointRef, int]:
    """The position of the record that retired each checkpoint."""
    found = ((entry.seq, entry.record) for entry in entries)
    return {ref: seq for seq, record in found if isinstance(record, Retired) for ref in record.checkpoints}


def _named(run: str, checkpoints: Iterable[Committed]) -> frozenset[str]:
    return frozenset(layout.committed_file(run, c, file.name) for c in checkpoints for file in c.files)


def _doomed(run: str, c: Committed, sizes: Mapping[str, int], *, spared: frozenset[str]) -> Doomed:
    # A salvage and the whole checkpoint that followed it have files in common.
    keys = sorted(key for key in _named(run, [c]) if key in sizes and key not in spared)
    return Doomed(checkpoint=c, sized=tuple((key, sizes[key]) for key in keys))


def _fenced_prefixes(run: str, state: RunState, unfinished: Sequence[ObjectInfo]) -> tuple[str, ...]:
    """Prefixes under which whatever is unfinished stays so: nobody may commit there any more."""
    if not unfinished:
        return ()
    if state.finished:
        return (layout.data_prefix(run),)
    keys = (layout.parse_data(info.key) for info in unfinished)
    fenced = {(k.attempt, k.incarnation) for k in keys if k and k.attempt < state.attempt}
    return tuple(layout.attempt_prefix(run, number, who) for number, who in sorted(fenced))
