"""What must hold when a sweep is over, judged from its store and from what trainers were told.

I1 and I2 (what was committed is there), I3 and I4 (nothing but the newest commit is resumed from, and only
the owner commits), I5 and I6 (one result for each run, and the right bytes), I7 (nothing was deleted that is
needed) and I9 (no litter) are judged here; that a sweep ends at all (I8) is seen by whoever lives it.
"""

from collections import Counter
from collections.abc import Collection, Sequence

from support.fake_cluster import FILE, FakeCluster, weights_at
from support.invariants import leftovers, violations

from orchestrator.grid.sweep import PlannedRun, Sweep
from storage import layout
from storage.errors import NotFound
from storage.garbage.rules import orphans
from storage.log import run_log
from storage.object_store import ObjectStore
from storage.records import (
    CancelRequested,
    Claimed,
    Committed,
    Finished,
    Outcome,
    Record,
    Started,
)
from storage.run_state import RunState


def judge(
    sweep: Sweep,
    store: ObjectStore,
    clusters: Sequence[FakeCluster],
    *,
    most_attempts: int | None = None,
    arrived_late: Collection[str] = (),
) -> list[str]:
    """Return a sentence for each thing that must hold and does not.

    Args:
        most_attempts: What a run may have needed; None: any number.
        arrived_late: Calls that the store carried out when nobody waited for them any more. What they left is
            for ``gc``, which must know it for what it is.
    """
    blamed = {attempt for cluster in clusters for attempt in cluster.blamed}
    lost_agents = {slot for cluster in clusters for slot in cluster.lost_agents}
    trainers = [trainer for cluster in clusters for trainer in cluster.trainers]
    begun = Counter(trainer.order for trainer in trainers)
    found = [
        f"{trainer.order} was fenced though it owned the run: {trainer.wronged}"
        for trainer in trainers
        if trainer.wronged and begun[trainer.order] == 1  # a second one meets what the first has committed
    ]
    for run in sweep.runs:
        log = run_log(store, run.run_id, readers=1)
        state = log.refresh()
        records = [entry.record for entry in log.entries()]
        acknowledged = [
            record
            for trainer in trainers
            if trainer.order.run_id == run.run_id
            for record in trainer.acknowledged
        ]
        own_faults = sum(
            (run.run_id, attempt.number) in blamed or attempt.claimed.slot in lost_agents
            for attempt in state.attempts
        )
        if most_attempts is not None and state.attempt > most_attempts:
            found.append(f"{run.run_id}: took {state.attempt} attempts instead of {most_attempts}")
        found += violations(store, run.run_id)
        found += _result(run, state, records, store, may_fail=own_faults >= sweep.recovery.max_failures)
        found += _kept(run, records, acknowledged)
        data = store.list(layout.data_prefix(run.run_id))
        for_gc = {o.key for o in orphans(run.run_id, state, data) if f"put {o.key}" in arrived_late}
        found += [f"left behind: {k}" for k in leftovers(store, run.run_id, state) if k not in for_gc]
        found += [f"{run.run_id}: retired, and still there: {c.ref}" for c in state.retired]
    return found


def _result(
    run: PlannedRun, state: RunState, records: Sequence[Record], store: ObjectStore, *, may_fail: bool
) -> list[str]:
    """One end for each run, and no other than what its log allows."""
    ends = [record for record in records if isinstance(record, Finished)]
    if len(ends) != 1:
        return [f"{run.run_id}: {len(ends)} results"]
    outcome, asked = ends[0].outcome, any(isinstance(record, CancelRequested) for record in records)
    if outcome is Outcome.SUCCEEDED:
        if state.result is None:
            return [f"{run.run_id}: succeeded without a result"]
        try:
            final = store.get(layout.committed_file(run.run_id, state.result, FILE))
        except NotFound as error:
            return [f"{run.run_id}: its result is not there: {error}"]
        if final != weights_at(run.run_id, run.spec.base.max_train_steps):
            return [f"{run.run_id}: its result was trained from other bytes than its own"]
    elif state.result is not None:
        return [f"{run.run_id}: {outcome}, though it is complete"]
    elif outcome is Outcome.CANCELLED and not asked:
        return [f"{run.run_id}: cancelled, and nobody asked for it"]
    elif outcome is Outcome.FAILED and not may_fail:
        return [f"{run.run_id}: failed by no fault of its own: {ends[0].detail}"]
    return []


def _kept(run: PlannedRun, records: Sequence[Record], acknowledged: Sequence[Committed]) -> list[str]:
    """What trainers were told is committed is in the log, and no committed step was trained again."""
    written = {(r.attempt, r.step, r.final, r.incarnation) for r in records if isinstance(r, Committed)}
    found = [
        f"{run.run_id}: acknowledged, and not in the log: {c.ref}"
        for c in acknowledged
        if (c.attempt, c.step, c.final, c.incarnation) not in written
    ]
    committed, claimed_at = 0, 0
    for record in records:
        match record:
            case Claimed():
                claimed_at = committed
            case Committed(step=step, final=final):
                if step < committed or (step == committed and not final):
                    found.append(f"{run.run_id}: step {step} is committed after step {committed}")
                committed = step
            case Started(step=step) if step < claimed_at:
                found.append(f"{run.run_id}: resumed from step {step}, though {claimed_at} was committed")
    return found
