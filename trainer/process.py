"""The training process: ``python -m trainer.process``, see ``rundir`` for its contract.

Imports everything heavy first and only then reads which run directory is its own, so that a spare process can
be kept warm. It lives no longer than whoever holds the other end of its stdin.
"""

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import traceback
from pathlib import Path

from storage.local import DISK_UNUSABLE

from .rundir import EXIT_DISK_FULL, RunDir, append_event
from .stop import Stop


def main() -> int:
    """Serve one run and return the exit code."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    stop = Stop()
    stop.exit_at_once = True
    stop.listen()
    _import_everything()
    line = _read_line()
    if line is None:
        return 0
    run_dir = RunDir(Path(json.loads(line)["run_dir"]))
    _redirect_output(run_dir.log)
    _die_with_stdin()
    return serve(run_dir, stop)


def serve(run_dir: RunDir, stop: Stop) -> int:
    """Train, turning what goes wrong into an ``error`` event, a traceback in the log, and an exit code."""
    from .attempt import run_attempt
    from .errors import TrainerError

    try:
        return run_attempt(run_dir, stop)
    except TrainerError as error:
        return _failed(run_dir, error, error.hint, error.exit_code)
    except OSError as error:
        code = EXIT_DISK_FULL if error.errno in DISK_UNUSABLE else 1
        return _failed(run_dir, error, f"see {run_dir.log.name}", code)
    except Exception as error:
        return _failed(run_dir, error, f"see {run_dir.log.name}", 1)


def _failed(run_dir: RunDir, error: Exception, hint: str, code: int) -> int:
    with contextlib.suppress(OSError):  # the disk of the log may be the very one that is full
        traceback.print_exception(error)
    append_event(run_dir.events, "error", type=type(error).__name__, message=str(error), hint=hint)
    return code


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


def _die_with_stdin() -> None:
    """When stdin ends, kill this process's group: the process and all that it started."""
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)  # never kill the group of whoever started us

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="stdin").start()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # checkpoints are written and joined; tearing down torch could only change the code
