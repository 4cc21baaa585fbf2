"""Runs one attempt of a tiny run in a folder, and reads what it left."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from storage.local import complete_checkpoints
from trainer.config import RunSpec
from trainer.rundir import (
    EXIT_COMPLETE,
    EXIT_PREEMPTED,
    CheckpointPolicy,
    Options,
    RunDir,
    StartOrder,
    read_events,
)
from trainer.stop import Stop

Lay = Callable[..., RunDir]
"""``lay_out`` within a test's own folder, by name."""


class StopAtStep(Stop):
    """A stop that is requested once the run's events show a step."""

    def __init__(self, run_dir: RunDir, step: int) -> None:
        super().__init__()
        self._run_dir, self._step = run_dir, step

    @property
    def requested(self) -> bool:
        return any(event["step"] >= self._step for event in events(self._run_dir, "step"))


def lay_out(
    root: Path,
    spec: RunSpec,
    *,
    resume: Path | None = None,
    cache: Path,
    every_steps: int | None = None,
    **how: Any,
) -> RunDir:
    """Write a run directory that an attempt can start from at once; ``how``: more of ``Options``."""
    run_dir = RunDir(root)
    run_dir.checkpoints.mkdir(parents=True)
    run_dir.spec.write_text(spec.model_dump_json())
    policy = CheckpointPolicy(every_steps=every_steps, every_s=None)
    options = Options(threads=1, cache_dir=str(cache), checkpoint=policy, **how)
    run_dir.options.write_text(options.model_dump_json())
    run_dir.order_start(StartOrder(resume=str(resume) if resume else None))
    return run_dir


def interrupted(lay: Lay, spec: RunSpec, step: int) -> tuple[RunDir, RunDir, RunDir]:
    """Train a run undisturbed, and once more with a stop after a step. Returns what was undisturbed, what was
    stopped, and what went on from there."""
    from trainer.attempt import run_attempt

    straight, first = lay("straight", spec), lay("first", spec)
    assert run_attempt(straight, Stop()) == EXIT_COMPLETE
    assert run_attempt(first, StopAtStep(first, step)) == EXIT_PREEMPTED
    again = lay("again", spec, resume=newest(first))
    assert run_attempt(again, Stop()) == EXIT_COMPLETE
    return straight, first, again


def events(run_dir: RunDir, kind: str | None = None) -> list[dict[str, Any]]:
    found = [event for _, event in read_events(run_dir.events)]
    return [event for event in found if kind is None or event["event"] == kind]


def newest(run_dir: RunDir) -> Path:
    """The newest complete checkpoint."""
    return complete_checkpoints(run_dir.checkpoints)[0].path


def contents(checkpoint: Path) -> dict[str, bytes]:
    """Every file of a checkpoint, by name."""
    return {path.name: path.read_bytes() for path in sorted(checkpoint.iterdir())}
