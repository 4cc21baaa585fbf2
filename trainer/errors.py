"""What can end a training process. The only question a class answers: would trying again help?

TrainerError
├── BadInput          the spec, the data or the base model are wrong      no                       exit 78
├── BadCheckpoint     the checkpoint to resume from cannot be used        with an earlier one      exit 65
├── BaseUnavailable   the hub did not answer                              yes                      exit 68
├── DiskFull          the node's disk is full or cannot be written        elsewhere, or after a while exit 73
├── NodeUnfit         the node lacks what the run needs                   elsewhere                exit 71
├── Diverged          loss or gradient is not finite                      seldom: the retry rule decides
├── CommandFailed     a foreign command could not be started, or failed     perhaps                  exit 1
└── EvaluationFailed  the evaluate command did not give scores            perhaps                  exit 1
"""

from .rundir import (
    EXIT_BAD_CHECKPOINT,
    EXIT_BAD_CONFIG,
    EXIT_DISK_FULL,
    EXIT_HUB_UNREACHABLE,
    EXIT_UNFIT,
)


class TrainerError(Exception):
    """Anything this package raises on purpose. ``hint`` says what to do next."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class BadInput(TrainerError):
    """The spec, the data or the base model are wrong: no retry can help."""

    exit_code = EXIT_BAD_CONFIG


class BadCheckpoint(TrainerError):
    """The checkpoint to resume from is damaged or belongs to something else."""

    exit_code = EXIT_BAD_CHECKPOINT


class BaseUnavailable(TrainerError):
    """The base model or the data set could not be fetched now."""

    exit_code = EXIT_HUB_UNREACHABLE


class DiskFull(TrainerError):
    """What the run must keep cannot be written on this node."""

    exit_code = EXIT_DISK_FULL


class NodeUnfit(TrainerError):
    """This node lacks what the run needs, and another may have it."""

    exit_code = EXIT_UNFIT


class Diverged(TrainerError):
    """The loss or its gradient is infinite or not a number; the adapter was not touched by it."""


class CommandFailed(TrainerError):
    """A foreign training command could not be started on this node, or failed without an exception."""


class EvaluationFailed(TrainerError):
    """The evaluate command failed, timed out, or printed no scores."""
