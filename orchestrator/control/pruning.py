"""What a controller retires and deletes of a run.

Data goes only by what the log itself says, which is proven first: a snapshot may be wrong. What the store
does not let us delete stays, and costs nothing but space.
"""

import logging

from storage.errors import AccessDenied
from storage.records import CheckpointRef
from storage.retention import plan_prune, plan_salvaged
from storage.run_state import RunState

from ..grid.sweep import Sweep
from .tracked_run import TrackedRun

DENIED_S = 60.0
"""How long a store that refused to delete is not asked again."""

logger = logging.getLogger(__name__)


def prune(run: TrackedRun, sweep: Sweep, now: float) -> None:
    """Retire what policy does not keep, and delete what was retired long enough ago."""
    try:
        _retire(run, sweep)
        if run.state.retired:
            state = run.log.proven()
            run.checkpoints.reap(state, grace_s=0.0 if state.finished else sweep.checkpoint.grace_s)
    except AccessDenied as error:
        _not_deleted(run, error, now)


def delete_orphans(run: TrackedRun, now: float) -> None:
    """Delete what a run that is over has left behind without a record."""
    try:
        state = run.log.proven()
        if state.retired:
            return  # another controller was first with a part of them: the next tick reaps the rest
        run.checkpoints.sweep_orphans(state)
        run.tidy = state.finished is not None
    except AccessDenied as error:
        _not_deleted(run, error, now)


def _not_deleted(run: TrackedRun, error: AccessDenied, now: float) -> None:
    if not run.undeletable:
        logger.warning("%s: nothing can be deleted: %s", run.plan.run_id, error)
    run.undeletable, run.clean_at = True, now + DENIED_S
    run.tidy = run.state.finished is not None


def _retire(run: TrackedRun, sweep: Sweep) -> None:
    state, policy = run.state, sweep.checkpoint
    if len(state.checkpoints) <= policy.keep_last and not state.salvaged:
        return
    superfluous = plan_prune(
        state.checkpoints,
        keep_last=policy.keep_last,
        keep_every=policy.keep_every,
        keep_best=policy.keep_best,
        metric=sweep.metric.name if sweep.metric else None,
        goal=sweep.metric.goal if sweep.metric else "minimize",
        pinned=(*_pinned(state), *state.pinned),
    )
    superfluous += plan_salvaged(state)
    if superfluous:
        run.checkpoints.retire(superfluous)


def _pinned(state: RunState) -> tuple[CheckpointRef, ...]:
    """What the live attempt resumes from may still be read until it has made its first step."""
    running = state.running
    if running is None or running.started:
        return ()
    return tuple(c.ref for c in state.checkpoints if c.step == running.resumed_from)
