"""The training process: ``python -m trainer.process``, see ``rundir`` for its contract.

Imports everything heavy first and only then reads which run directory is its own, so that a spare process can
be kept warm. It lives no longer than whoever holds the other end of its stdin.
"""

import contextlib
import faulthandler
import json
import logging
import os
import signal
import sys
import traceback
from pathlib import Path

from storage.local import DISK_UNUSABLE
from storage.records import EndReason

from .evidence import ADVICE, by_exception
from .gpu_check import check_gpu
from .orphan import die_when_abandoned, die_with_stdin
from .rundir import EXIT_DISK_FULL, RunDir, append_event
from .stop import Stop


def main() -> int:
    """Serve one run and return the exit code."""
    die_when_abandoned()  # first: what follows may hang, in an import or a driver
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    stop = Stop()
    stop.exit_at_once = True
    stop.listen()
    # Written by the signal's handler itself, to whatever stderr is then: also when no Python code can run.
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    _import_everything()
    check_gpu()
    line = _read_line()
    if line is None:
        return 0
    run_dir = RunDir(Path(json.loads(line)["run_dir"]))
    _redirect_output(run_dir.log)
    die_with_stdin()
    return serve(run_dir, stop)


def serve(run_dir: RunDir, stop: Stop) -> int:
    """Train, turning what goes wrong into an ``error`` event, a traceback in the log, and an exit code."""
    from .attempt import run_attempt
    from .errors import TrainerError

    try:
        return run_attempt(run_dir, stop)
    except TrainerError as error:
        return _failed(run_dir, error, error.hint, error.exit_code)
    except MemoryError as error:
        return _failed(run_dir, error, ADVICE[EndReason.OOM_HOST], 1)
    except OSError as error:
        code = EXIT_DISK_FULL if error.errno in DISK_UNUSABLE else 1
        return _failed(run_dir, error, f"see {run_dir.log.name}", code)
    except Exception as error:
        reason = by_exception(type(error).__name__, str(error))
        hint = ADVICE.get(reason) if reason else None
        return _failed(run_dir, error, hint or f"see {run_dir.log.name}", 1)


def _failed(run_dir: RunDir, error: Exception, hint: str, code: int) -> int:
    with contextlib.suppress(OSError):  # the disk of the log may be the very one that is full
        traceback.print_exception(error)
    kind, message = type(error).__name__, str(error)
    size = _gpu_bytes() if by_exception(kind, message) is EndReason.OOM_GPU else None
    told = {"memory_bytes": size} if size else {}
    append_event(run_dir.events, "error", type=kind, message=message, hint=hint, **told)
    return code


def _gpu_bytes() -> int | None:
    """The size of the GPU that was too small, if it can still say so."""
    import torch

    with contextlib.suppress(Exception):
        return int(torch.cuda.get_device_properties(0).total_memory)
    return None


def _import_everything() -> None:
    # Their advice about optional packages, printed while importing, is not about any run.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    from . import attempt  # noqa: F401
    from .families import sd1  # noqa: F401
    from .methods import lora  # noqa: F401

    with contextlib.suppress(ImportError):  # only adamw8bit needs it, and says so
        import bitsandbytes  # noqa: F401


def _read_line() -> bytes | None:
    """Read one line from stdin, byte by byte: a buffered reader would hold a lock that exiting waits for."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return None
        line += byte
    return line


def _redirect_output(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # checkpoints are written and joined; tearing down torch could only change the code
