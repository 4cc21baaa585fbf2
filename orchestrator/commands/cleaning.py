"""``gc``: what a store holds beside what its sweeps need, and getting rid of it.

``look`` reads (one listing, the logs), ``survey`` plans, ``carry_out`` deletes. Each may be killed at any
point, and run beside another and beside controllers: see ``storage.garbage`` for why.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from storage import layout
from storage.directory import DirectoryStore
from storage.errors import Corrupt, InvalidName, StorageError, Unavailable
from storage.garbage.collecting import (
    Collected,
    ContentPlan,
    TellsTime,
    collect_content,
    collect_loose,
    collect_run,
    collect_uploads,
    plan_contents,
    read_logs,
    store_time,
)
from storage.garbage.inventory import Inventory, take, written_s
from storage.garbage.rules import (
    GRACE_S,
    Keep,
    RunPlan,
    leftovers,
    old_enough,
    plan_run,
)
from storage.garbage.usage import Counted
from storage.ledger import Ledger
from storage.log import RunLog, RunSnapshot, run_log
from storage.object_store import ObjectInfo, ObjectStore
from storage.records import Finished
from storage.snapshots import read_sweep

from ..errors import OrchestrateError, Unknown
from ..grid.submission import load_submitted
from ..grid.sweep import Sweep

LedgerOf = Callable[[str, str], Ledger | None]
"""For a sweep ("": none) and a run: where to append, or None."""


@dataclass(slots=True)
class Store:
    """A store as it was found: one listing, and the logs of all runs."""

    inventory: Inventory
    sweeps: dict[str, Sweep]
    logs: dict[str, RunLog]
    damaged: dict[str, str]
    """By run or sweep: why it cannot be read, so nothing of it is touched."""
    requests: int
    now_s: float | None

    def give_up(self, run: str, error: StorageError) -> None:
        """Its log is not to be planned by: after an error it tells only what comes before the damage."""
        self.damaged[run] = str(error)
        del self.logs[run]

    @property
    def sweep_of(self) -> dict[str, str]:
        return {run.run_id: name for name, sweep in self.sweeps.items() for run in sweep.runs}


@dataclass(slots=True)
class Survey:
    """What goes, by whose it is."""

    found: Store
    runs: dict[str, list[RunPlan]] = field(default_factory=dict)
    """By sweep; "": runs of no sweep that can be read."""
    probes: tuple[ObjectInfo, ...] = ()
    terms: tuple[ObjectInfo, ...] = ()
    uploads: tuple[ObjectInfo, ...] = ()
    contents: list[ContentPlan] = field(default_factory=list)
    unwritable: set[str] = field(default_factory=set)
    """Sweeps into whose logs nobody may write any more."""

    @property
    def steps(self) -> int:
        """How much there is to do, in no particular unit."""
        plans = [plan for plans in self.runs.values() for plan in plans]
        of_runs = sum(
            bool(p.orphans) + len(p.uploads) + bool(p.reap) + bool(p.retire) for p in plans if p.work
        )
        contents = sum(bool(c.reap) + len(c.retire) for c in self.contents)
        return of_runs + contents + bool(self.probes) + bool(self.terms) + len({u.key for u in self.uploads})


def look(
    store: ObjectStore, *, on_read: Callable[[int, int], None] = lambda done, of: None, only: str = ""
) -> Store:
    """Read what is in a store.

    Args:
        on_read: Told how many logs were read, of how many.
        only: The one sweep whose logs are to be read.

    Raises:
        Unknown: There is no such folder.
        AccessDenied, Unavailable
    """
    counted = Counted(store)
    inventory = take(counted)
    if isinstance(store, DirectoryStore) and not store.root.is_dir():  # a mistyped path is not an empty store
        raise Unknown(f"{store.url}: there is no store, for there is no such folder")
    sweeps, damaged = _sweeps(counted, inventory)
    wanted = {run.run_id for run in sweeps[only].runs} if only else inventory.runs.keys()
    with_log = [run for run in inventory.runs if inventory.runs[run].log and run in wanted]
    done = 0

    def read() -> None:
        nonlocal done
        done += 1
        on_read(done, len(with_log))

    logs: dict[str, RunLog] = {}
    known = _snapshots(counted, inventory, {only} if only else sweeps.keys())
    for run, log in read_logs(counted, with_log, known, on_read=read).items():
        if isinstance(log, Corrupt):
            damaged[run] = str(log)
        else:
            logs[run] = log
    now_s = store_time(store, inventory)
    requests = counted.requests + isinstance(store, TellsTime)
    return Store(inventory, sweeps, logs, damaged, requests, now_s)


def survey(
    store: ObjectStore,
    found: Store,
    *,
    keep_last: int | None = None,
    older_than_s: float | None = None,
) -> Survey:
    """Plan what goes.

    Args:
        keep_last: How many of a run's newest checkpoints stay, instead of what its sweep says.
        older_than_s: Of sweeps that ended so long ago, by the store's clock, all checkpoints go but the
            newest, final, best and pinned ones.
    """
    plan = Survey(found)
    for name, sweep in sorted(found.sweeps.items()):
        keep = _keep(sweep, keep_last)
        if older_than_s is not None and _over_since(sweep, found, older_than_s):
            keep = Keep(last=1, best=keep.best, metric=keep.metric, maximize=keep.maximize)
        mine = [run.run_id for run in sweep.runs if run.run_id in found.logs]
        plan.runs[name] = _plans(found, mine, keep, sweep.checkpoint.grace_s)
    sweep_of = found.sweep_of
    plan.runs[""] = _plans(found, [run for run in sorted(found.logs) if run not in sweep_of], None, GRACE_S)
    plan.probes, plan.terms, plan.uploads = leftovers(found.inventory, found.now_s)
    plan.contents = plan_contents(store, found.inventory.contents, found.now_s)
    return plan


def leave_out_unwritable(plan: Survey) -> list[str]:
    """Leave out what nobody can do where only controllers may write; returns what that is, for a person.

    A sweep that is over has no controller any more, and shared content never has one.
    """
    left = []
    for name, runs in plan.runs.items():
        sweep = plan.found.sweeps.get(name)
        if sweep and not all(_is_over(plan.found, run.run_id) for run in sweep.runs):
            continue
        if count := sum(len(run.retire) for run in runs):
            left.append(f"{count} superseded checkpoint{'s' * (count != 1)} of {name}, which is over")
        plan.unwritable.add(name)
        # What was retired is deleted without a record: once nothing of it lies there, that is done.
        plan.runs[name] = [
            replace(run, retire=(), reap=tuple(doomed for doomed in run.reap if doomed.sized)) for run in runs
        ]
    if plan.contents:
        left.append("content that no sweep uses")
    plan.contents = []
    return left


def carry_out(store: ObjectStore, plan: Survey, ledger_of: LedgerOf) -> Iterator[Collected]:
    """Delete what is planned, step by step."""
    for name, runs in plan.runs.items():
        for run in runs:
            if not run.work:
                continue
            try:
                sure = _confirmed(store, plan.found, run)
            except (Corrupt, InvalidName) as error:
                yield Collected(damaged=str(error))
                continue
            except Unavailable as error:
                yield Collected(failed=str(error))
                return
            needs_record = bool(sure.reap or sure.retire) and name not in plan.unwritable
            ledger = ledger_of(name, run.run) if needs_record else None
            yield from collect_run(store, sure, ledger)
    if plan.probes:
        yield collect_loose(store, plan.probes)
    if plan.terms:
        yield collect_loose(store, plan.terms)
    yield from collect_uploads(store, plan.uploads)
    for content in plan.contents:
        yield from collect_content(store, content)


def _sweeps(store: ObjectStore, inventory: Inventory) -> tuple[dict[str, Sweep], dict[str, str]]:
    sweeps, damaged = {}, {}
    for name, infos in inventory.sweeps.items():
        if not any(info.key.endswith("/spec.json") for info in infos):
            continue
        try:
            sweeps[name] = load_submitted(store, name)
        except OrchestrateError as error:  # a newer version's, perhaps: its runs keep all that they have
            damaged[name] = str(error)
    return sweeps, damaged


def _plans(found: Store, runs: Iterable[str], keep: Keep | None, grace_s: float) -> list[RunPlan]:
    """Plan for these runs. One that turns out damaged, before what its snapshot spared us, is left alone."""
    plans = []
    for run in runs:
        try:
            plans.append(_plan(found, run, keep, grace_s))
        except (Corrupt, InvalidName) as error:
            found.give_up(run, error)
    return plans


def _plan(found: Store, run: str, keep: Keep | None, grace_s: float) -> RunPlan:
    log = found.logs[run]
    entries = log.entries() if log.state.retired else ()
    return plan_run(
        run, found.inventory.runs[run], log.state, entries, keep=keep, grace_s=grace_s, now_s=found.now_s
    )


def _confirmed(store: ObjectStore, found: Store, planned: RunPlan) -> RunPlan:
    """Plan again from the whole log: a snapshot is a cache, and nothing is deleted on its word.

    Raises:
        Corrupt, InvalidName, Unavailable, AccessDenied
    """
    log = run_log(store, planned.run)
    state = log.refresh()
    objects = found.inventory.runs[planned.run]
    return plan_run(
        planned.run,
        objects,
        state,
        log.entries(),
        keep=planned.keep,
        grace_s=planned.grace_s,
        now_s=found.now_s,
    )


def _snapshots(store: ObjectStore, inventory: Inventory, sweeps: Iterable[str]) -> dict[str, RunSnapshot]:
    """What the sweeps' controllers left of their runs' logs, by run."""
    found: dict[str, RunSnapshot] = {}
    for name in sweeps:
        if any(info.key == layout.sweep_snapshot(name) for info in inventory.sweeps[name]):
            found |= {run: known.snapshot for run, known in read_sweep(store, name).items()}
    return found


def keep_of(sweep: Sweep) -> Keep:
    """What a sweep's file says about its checkpoints; the best one stays in any case."""
    return _keep(sweep, None)


def _keep(sweep: Sweep, last: int | None) -> Keep:
    return Keep(
        last=last or sweep.checkpoint.keep_last,
        every=sweep.checkpoint.keep_every,
        best=max(1, sweep.checkpoint.keep_best),
        metric=sweep.metric.name if sweep.metric else None,
        maximize=bool(sweep.metric and sweep.metric.goal == "maximize"),
    )


def _is_over(found: Store, run: str) -> bool:
    return run in found.logs and found.logs[run].state.finished is not None


def _over_since(sweep: Sweep, found: Store, older_than_s: float) -> bool:
    """Whether every run of a sweep ended at least so long ago, by the store's clock."""
    for run in sweep.runs:
        log = found.logs.get(run.run_id)
        try:
            ends = [e.seq for e in log.entries() if isinstance(e.record, Finished)] if log else []
        except Corrupt as error:
            found.give_up(run.run_id, error)
            return False
        if not ends:
            return False
        written = written_s(found.inventory.runs[run.run_id].log, ends[0])
        if not old_enough(written, older_than_s, found.now_s):
            return False
    return True
