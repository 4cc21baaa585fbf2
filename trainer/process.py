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
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from .gpu_check import check_gpu
from .orders import read_spec
from .orphan import die_when_abandoned, die_with_stdin
from .rundir import RunDir
from .serving import guarded, read_line, redirect_output
from .stop import Stop


def main() -> int:
    """Serve one run and return the exit code."""
    environment = dict(os.environ)
    die_when_abandoned()  # first: what follows may hang, in an import or a driver
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    stop = Stop()
    stop.exit_at_once = True
    stop.listen()
    # Written by the signal's handler itself, to whatever stderr is then: also when no Python code can run.
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    _import_everything()
    check_gpu()
    line = read_line()
    if line is None:
        return 0
    run_dir = RunDir(Path(json.loads(line)["run_dir"]))
    redirect_output(run_dir.log)
    die_with_stdin()
    return serve(run_dir, stop, environment)


def serve(run_dir: RunDir, stop: Stop, environment: Mapping[str, str] = os.environ) -> int:
    """Train and return the exit code.

    A run with a ``command`` needs nothing of what was imported, nor the GPU's memory that it took: then this
    process becomes ``trainer.command``.

    Args:
        environment: For that, what it was when this process started.
    """

    def work() -> int:
        if read_spec(run_dir).command is not None:
            _become_command(run_dir, environment)
        from .attempt import run_attempt

        return run_attempt(run_dir, stop)

    return guarded(run_dir, work, _gpu_bytes)


def _become_command(run_dir: RunDir, environment: Mapping[str, str]) -> NoReturn:
    """Go on as another program, under the same number, with the same stdin, stdout and stderr only."""
    for descriptor in range(3, max((int(name) for name in os.listdir("/dev/fd")), default=2) + 1):
        with contextlib.suppress(OSError):
            os.set_inheritable(descriptor, False)
    words = [sys.executable, "-m", "trainer.command", str(run_dir.root)]
    os.execve(sys.executable, words, environment)


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
    from .config.families import FAMILIES
    from .families import family_class
    from .methods import adapter  # noqa: F401

    for names in FAMILIES.values():
        for name in names:
            family_class(name)
    with contextlib.suppress(ImportError):  # only AdamW8bit and Lion need it, and say so
        import bitsandbytes  # noqa: F401


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # checkpoints are written and joined; tearing down torch could only change the code
