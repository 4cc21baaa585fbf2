"""Whether the GPU of this process works, found out before a run relies on it.

The verdict is written to the file that ``GPU_CHECK`` names, by rename: ``GPU_WORKS``, or what is wrong.
A process whose GPU does not work ends with ``EXIT_UNFIT``.
"""

import os
import sys
from pathlib import Path

from .patience import one_line
from .rundir import EXIT_UNFIT, GPU_CHECK, GPU_WORKS

LEAST_FREE = 0.5
"""So much of a GPU's memory must be free before anything was trained: it is for this process alone."""


def check_gpu() -> None:
    """Write the verdict if somebody wants it, and end the process if it is bad."""
    if not (wanted := os.environ.pop(GPU_CHECK, "")):
        return
    try:
        problem = gpu_problem()
    except Exception as error:  # whatever a driver can do wrong
        problem = one_line(
            f"its GPU does not work: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        )
    target = Path(wanted)
    temporary = target.with_suffix(".tmp")
    temporary.write_text(problem or GPU_WORKS)
    temporary.replace(target)
    if problem:
        sys.stdout.flush()
        os._exit(EXIT_UNFIT)


def gpu_problem() -> str:
    """Multiply two small matrices; returns what is wrong, or "".

    Raises:
        Exception: Whatever torch says of a GPU that does not work.
    """
    import torch

    if not torch.cuda.is_available():
        return "torch sees no GPU there: is the driver installed, and does it fit this torch?"
    side = 256
    ones = torch.ones((side, side), device="cuda")
    if float((ones @ ones).sum()) != float(side**3):
        return "its GPU computes wrong results"
    free, total = torch.cuda.mem_get_info()
    if free < LEAST_FREE * total:
        return f"something else holds its GPU's memory: {free / 1e9:.1f} of {total / 1e9:.1f} GB are free"
    return ""
