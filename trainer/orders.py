"""What a training process reads from its run directory before it begins."""

import time

from pydantic import ValidationError

from .config import RunSpec
from .errors import BadInput
from .rundir import Options, RunDir, StartOrder

_POLL_S = 0.02


def read_spec(run_dir: RunDir) -> RunSpec:
    try:
        return RunSpec.model_validate_json(run_dir.spec.read_bytes())
    except (OSError, ValidationError) as error:
        raise BadInput(f"{run_dir.spec}: {error}") from error


def read_options(run_dir: RunDir) -> Options:
    try:
        return Options.model_validate_json(run_dir.options.read_bytes())
    except (OSError, ValidationError) as error:
        raise BadInput(f"{run_dir.options}: {error}") from error


def wait_for_order(run_dir: RunDir) -> StartOrder:
    """Wait until the supervisor has fetched what to resume from."""
    while not run_dir.start.exists():
        time.sleep(_POLL_S)
    try:
        return StartOrder.model_validate_json(run_dir.start.read_bytes())
    except ValidationError as error:
        raise BadInput(f"{run_dir.start}: {error}") from error
