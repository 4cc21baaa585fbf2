"""Commands run in this process, and what they look at: a sweep file, and sweeps whose logs tell a life."""

from collections.abc import Callable

from click.testing import CliRunner
from support.fake_cluster import small_sweep
from support.runs import claimed, committed

from orchestrator.cli import main
from orchestrator.grid.schema import Metric
from storage.records import Finished, Outcome, Record, Started

CAT = small_sweep(runs=2, name="cat", metric=Metric(name="val/loss"))
R0, R1 = (run.run_id for run in CAT.runs)

GRID = """\
name: tabby
parameters:
  learning_rate: {values: [1e-4, 2e-4]}
base: {model: owner/model, revision: abc, resolution: 32, max_train_steps: 300}
dataset: {path: data}
resources: {gpus: 0}
storage: {url: file://./store}
"""

Orchestrate = Callable[..., tuple[int, str, str]]


def invoke(*arguments: str) -> tuple[int, str, str]:
    """Run a command; returns its exit code, what it printed, and what it said."""
    result = CliRunner().invoke(main, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def succeeded(loss: float, steps: int = 6) -> tuple[Record, ...]:
    return (
        claimed(),
        Started(attempt=1, step=0, at=1.5),
        committed(steps, metrics={"train/loss": 0.5, "val/loss": loss}, final=True),
        Finished(outcome=Outcome.SUCCEEDED, step=steps, at=5.0),
    )


FAILED = (claimed(), Finished(outcome=Outcome.FAILED, detail="BadInput: no images", step=0, at=5.0))
