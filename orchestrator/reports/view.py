"""What a person sees of a sweep, derived from the logs: nothing here is stored."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from storage.errors import Corrupt
from storage.object_store import ObjectStore
from storage.records import Outcome
from storage.redaction import printable
from storage.run_state import RunState

from ..control.cluster import Work
from ..grid.sweep import PlannedRun, Sweep
from .sweep_logs import SweepLogs
from .why import interruptions


class Status(StrEnum):
    """SkyPilot's words."""

    PENDING = "PENDING"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    RECOVERING = "RECOVERING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLING = "CANCELLING"
    CANCELLED = "CANCELLED"


OVER = frozenset({Status.SUCCEEDED, Status.FAILED, Status.CANCELLED})


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """One row of the status table."""

    run: str
    params: dict[str, Any]
    status: Status
    step: int
    """The newest step known: live if the cluster was asked, else committed."""
    max_steps: int
    committed_step: int
    loss: float | None
    metric: float | None
    attempts: int
    lost_steps: int
    lost_unreported: bool
    """More may be lost, of which nobody heard."""
    last_commit_at: float | None
    """Unix seconds."""
    node: str | None
    detail: str
    """Why it failed."""


def status(state: RunState) -> Status:
    """Return the word for where a run is."""
    if state.outcome is not None:
        return {
            Outcome.SUCCEEDED: Status.SUCCEEDED,
            Outcome.FAILED: Status.FAILED,
            Outcome.CANCELLED: Status.CANCELLED,
        }[state.outcome]
    if state.cancel_requested:
        return Status.CANCELLING
    if not state.attempts:
        return Status.PENDING
    if state.running and state.running.started:
        return Status.RUNNING
    return Status.RECOVERING if len(state.attempts) > 1 or not state.running else Status.STARTING


def described(parameters: Mapping[str, Any]) -> str:
    """Return a run's parameters on one line, without anything that a terminal would obey."""
    words = ((name, str(value)) for name, value in parameters.items())
    return " ".join(f"{name}={text if text.isprintable() else ascii(text)}" for name, text in words)


def read_states(sweep: Sweep, store: ObjectStore) -> dict[str, RunState]:
    """Read every run's log, in sweep order.

    Raises:
        Corrupt: One is damaged.
        AccessDenied, Unavailable
    """
    logs = SweepLogs(sweep, store)
    logs.read()
    for problem in logs.damaged.values():
        raise Corrupt(problem)
    return logs.states


def read_rows(sweep: Sweep, store: ObjectStore) -> list[RunView]:
    """Read every run's log, and return a row per run: a damaged one's has failed.

    Raises:
        AccessDenied, Unavailable
    """
    logs = SweepLogs(sweep, store)
    logs.read()
    return rows(sweep, logs.states, damaged=logs.damaged)


def rows(
    sweep: Sweep,
    states: Mapping[str, RunState],
    training: Mapping[str, Work] | None = None,
    damaged: Mapping[str, str] | None = None,
) -> list[RunView]:
    """Return a row per run.

    Args:
        training: What slots hold right now, by run.
        damaged: Runs whose log is damaged, and how: nobody can go on with them.
    """
    training, damaged = training or {}, damaged or {}
    return [
        _row(sweep, run, states[run.run_id], training.get(run.run_id), damaged.get(run.run_id))
        for run in sweep.runs
    ]


def _row(sweep: Sweep, run: PlannedRun, state: RunState, work: Work | None, damage: str | None) -> RunView:
    step, loss = state.committed_step, None
    if work and state.running and work.attempt == state.attempt:
        step, loss = max(step, work.step), work.loss
    newest, cuts = state.newest, interruptions(state)
    detail = f"its log is damaged: {damage}" if damage else state.finished.detail if state.finished else ""
    return RunView(
        run=run.run_id,
        params=run.parameters,
        status=Status.FAILED if damage else status(state),
        step=step,
        max_steps=run.spec.max_steps,
        committed_step=state.committed_step,
        loss=loss if loss is not None else (newest.metrics.get("train/loss") if newest else None),
        metric=newest.metrics.get(sweep.metric.name) if newest and sweep.metric else None,
        attempts=len(state.attempts),
        lost_steps=sum(cut.lost_steps for cut in cuts),
        lost_unreported=any(cut.unreported for cut in cuts),
        last_commit_at=newest.at if newest else None,
        node=printable(state.running.claimed.node) if state.running else None,
        detail=printable(detail),
    )


def best(sweep: Sweep, views: Iterable[RunView]) -> RunView | None:
    """Return the succeeded run with the best metric; None if none reports it. NaN is never best."""
    scored = [
        v for v in views if v.status is Status.SUCCEEDED and v.metric is not None and math.isfinite(v.metric)
    ]
    sign = -1.0 if sweep.metric and sweep.metric.goal == "maximize" else 1.0
    return min(scored, key=lambda v: (sign * (v.metric or 0.0), v.run), default=None)


def as_json(sweep: Sweep, views: list[RunView]) -> dict[str, Any]:
    """Return the stable form of ``status -o json``."""
    winner = best(sweep, views)
    return {
        "schema": 1,
        "sweep": sweep.name,
        "metric": sweep.metric.name if sweep.metric else None,
        "goal": sweep.metric.goal if sweep.metric else None,
        "best": winner.run if winner else None,
        "runs": [asdict(view) for view in views],
    }
