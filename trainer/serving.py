"""What every process that serves a run directory does: read which one, log into it, say what it died of.

Imports no torch.
"""

import contextlib
import os
import traceback
from collections.abc import Callable
from pathlib import Path

from storage.local import DISK_UNUSABLE
from storage.records import EndReason

from .errors import TrainerError
from .evidence import ADVICE, by_exception, less_memory
from .orders import read_options, read_spec
from .rundir import EXIT_DISK_FULL, RunDir, append_event


def read_line() -> bytes | None:
    """Read one line from stdin, byte by byte: a buffered reader would hold a lock that exiting waits for."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return None
        line += byte
    return line


def redirect_output(log: Path) -> None:
    """Let stdout and stderr be the run's log from now on."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def guarded(
    run_dir: RunDir, work: Callable[[], int], gpu_bytes: Callable[[], int | None] = lambda: None
) -> int:
    """Do the work, turning what goes wrong into an ``error`` event, a traceback in the log, and an exit code.

    Args:
        gpu_bytes: The size of this process's GPU, asked if it was too small.
    """

    def failed(error: Exception, hint: str, code: int) -> int:
        with contextlib.suppress(OSError):  # the disk of the log may be the very one that is full
            traceback.print_exception(error)
        kind, message = type(error).__name__, str(error)
        if by_exception(kind, message) is EndReason.OOM_GPU:
            size = gpu_bytes()
            with contextlib.suppress(TrainerError):
                hint = less_memory(read_spec(run_dir).base, read_options(run_dir).micro_batch)
        else:
            size = None
        told = {"memory_bytes": size} if size else {}
        append_event(run_dir.events, "error", type=kind, message=message, hint=hint, **told)
        return code

    try:
        return work()
    except TrainerError as error:
        return failed(error, error.hint, error.exit_code)
    except MemoryError as error:
        return failed(error, ADVICE[EndReason.OOM_HOST], 1)
    except OSError as error:
        code = EXIT_DISK_FULL if error.errno in DISK_UNUSABLE else 1
        return failed(error, f"see {run_dir.log.name}", code)
    except Exception as error:
        reason = by_exception(type(error).__name__, str(error))
        hint = ADVICE.get(reason) if reason else None
        return failed(error, hint or f"see {run_dir.log.name}", 1)
