"""Writes what a run measured for TensorBoard or Weights & Biases, through accelerate's trackers.

    python -m trainer.tracking < job.json

A process of its own, fed from a run's events after the fact: what is written never depends on the node that
trained, nor on how often it was replaced. ``rows`` of a later job must begin beyond those before it; then the
same run is continued. Of a job that was cut short TensorBoard forgets what the next one writes again, and a
W&B server keeps the first value of each step.
"""

import sys
from pathlib import Path
from typing import Any, Literal

from .config import Frozen
from .errors import BadInput

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}


class Job(Frozen):
    """What to write where."""

    to: Literal["tensorboard", "wandb"]
    out: Path
    project: str
    """Of W&B: the sweep."""
    run: str
    settings: str
    """The run's spec, as JSON."""
    rows: tuple[tuple[int, dict[str, float]], ...]
    """Steps in ascending order, with what was measured there."""


def written(job: Job) -> None:
    """Write a job's rows.

    Raises:
        BadInput: The package that it needs is not installed.
    """
    if not job.rows:
        return
    from accelerate import PartialState

    PartialState(cpu=True)  # its trackers' logging insists on it
    try:
        tracker = _tracker(job)
        tracker.start()
    except ImportError as error:
        package = PACKAGES[job.to]
        raise BadInput(f"--to {job.to} needs {package}: {error}", f"pip install {package}") from error
    try:
        if job.to == "wandb":
            tracker.store_init_configuration({"spec": job.settings})
        else:
            tracker.log({"spec": job.settings}, step=job.rows[0][0])
        for step, values in job.rows:
            tracker.log(values, step=step)
    finally:
        tracker.finish()


def _tracker(job: Job) -> Any:
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    if job.to == "tensorboard":
        return TensorBoardTracker(job.run, job.out, purge_step=job.rows[0][0])
    return WandBTracker(
        job.project, dir=str(job.out), id=job.run, name=job.run, mode="offline", resume="allow"
    )


def main() -> int:
    job = Job.model_validate_json(sys.stdin.buffer.read())
    try:
        written(job)
    except BadInput as error:
        print(f"{error} — {error.hint}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
