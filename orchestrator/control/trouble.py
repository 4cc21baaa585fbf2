"""What it costs when something goes wrong while a run is dealt with: that run, for a while, and no other."""

import contextlib
import logging
from collections.abc import Callable, Iterator

from storage.errors import Corrupt, Fenced, StorageError

from .term import SteppedDown
from .tracked_run import TrackedRun

RETRY_S = 5.0
"""How long a run is left alone after the store failed it."""

DAMAGED_RETRY_S = 60.0
"""The same when its log is damaged: a person may repair it."""

DAMAGED = 2
"""A log that was found damaged so often in a row is: the run has failed, and nothing is appended."""

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def guarded(run: TrackedRun, monotonic: Callable[[], float]) -> Iterator[None]:
    """A store that fails, a lost race, a damaged log or a bug costs this run alone.

    Raises:
        SteppedDown: Another controller has taken over.
    """
    try:
        yield
    except Fenced as error:
        logger.warning("%s: %s; reading its log again", run.plan.run_id, error)
        run.read_at = float("-inf")
    except Corrupt as error:
        run.corrupt += 1
        if run.corrupt == DAMAGED:
            logger.error("%s has failed, its log is damaged: %s", run.plan.run_id, error)
        run.damage = str(error) if run.corrupt >= DAMAGED else None
        _leave_alone(run, error, monotonic())
    except SteppedDown:
        raise
    except Exception as error:  # a bug, or a report that no record can hold: the others must go on
        _leave_alone(run, error, monotonic())


def _leave_alone(run: TrackedRun, error: Exception, now: float) -> None:
    problem = f"{type(error).__name__}: {error}"
    if problem != run.problem:  # told once: the store may be away for hours
        foreign = None if isinstance(error, StorageError) else error
        logger.warning("%s: %s; trying again", run.plan.run_id, problem, exc_info=foreign)
    run.problem, run.quiet = problem, False
    run.retry_at = now + (DAMAGED_RETRY_S if run.damage else RETRY_S)
