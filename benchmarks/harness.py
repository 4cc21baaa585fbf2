"""What the benchmarks share: the digits run, figures, a table, the JSON line, and how a benchmark fails.

A benchmark fails (exits with 1) when something does not hold: what it ran crashed, a figure is missing, bits
differ that must be equal. A missed goal is only reported: machines differ, promises do not.
"""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from trainer.config import RunSpec

RESULTS = Path(__file__).resolve().parent / "results"
DIGITS = Path(__file__).resolve().parents[1] / "examples" / "digits"


class BenchmarkFailed(Exception):
    """Something that the benchmark relies on does not hold."""


def digits_spec(steps: int, *, rank: int = 8) -> RunSpec:
    """Return a run of the digits example that diffusers' script can do too: nothing held out, no samples."""
    return RunSpec.model_validate(
        {
            "base": {
                "model": str(DIGITS / "base"),
                "resolution": 32,
                "train_batch_size": 16,
                "rank": rank,
                "learning_rate": 1e-3,
                "max_train_steps": steps,
            },
            "dataset": {"path": str(DIGITS / "nines"), "val_fraction": 0.0},
        }
    )


def wait_for(condition: Callable[[], Any], what: str, *, timeout_s: float, every_s: float = 0.05) -> Any:
    """Return the first true value of ``condition``.

    Raises:
        BenchmarkFailed: There was none in time; the message says what was waited for.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(every_s)
    raise BenchmarkFailed(f"waited {timeout_s:.0f} s in vain for {what}")


def wait_until_warm(pid: int, *, timeout_s: float = 120.0) -> None:
    """Wait until a spare training process has imported everything: until it uses no CPU for a second."""

    def used_s() -> float:
        times = psutil.Process(pid).cpu_times()
        return float(times.user + times.system)

    def quiet() -> bool:
        before = used_s()
        time.sleep(1.0)
        return before > 1.0 and used_s() - before < 0.05

    wait_for(quiet, f"process {pid} to have imported everything", timeout_s=timeout_s)


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first column names the row."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def verdict(ratio: float, goal: float, *, at_least: bool = False) -> str:
    """Say how a ratio stands to its goal."""
    met = ratio >= goal if at_least else ratio <= goal
    side = "least" if at_least else "most"
    return f"{ratio:.2f} times, goal at {side} {goal:g}: {'met' if met else 'MISSED'}"


def conclude(name: str, figures: Mapping[str, Any], *, save: bool) -> None:
    """Print the figures as the last line; with ``save`` also keep them under ``results/``.

    Raises:
        BenchmarkFailed: A figure is missing.
    """
    if missing := [key for key, value in figures.items() if value is None]:
        raise BenchmarkFailed(f"no figure for {', '.join(missing)}")
    line = json.dumps(figures)
    if save:
        kept = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine(), **figures}
        (RESULTS / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")
    print(line)


def machine() -> str:
    """Return a short description of this machine's kind."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    memory_gb = round(psutil.virtual_memory().total / 2**30)
    return f"{os.cpu_count()} cores ({platform.machine()}), {memory_gb} GB, {gpu}, torch {torch.__version__}"


def median(values: Sequence[float], digits: int = 3) -> float:
    return round(statistics.median(values), digits)


def run(main: Callable[[], None]) -> None:
    """Run a benchmark's main function, turning its failure into a message and exit code 1."""
    try:
        main()
    except BenchmarkFailed as error:
        sys.exit(f"benchmark failed: {error}")
