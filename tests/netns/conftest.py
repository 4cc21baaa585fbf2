"""A cluster of machines for all rows, mended between them, and the table that ``make netns`` prints."""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from support.evidence import trained_alone
from support.namespaces import why_no_namespaces
from support.netns_cluster import NetnsCluster, netns_cluster, python_path
from support.rows import RowResult, summary
from support.tiny_world import build_base, build_images
from support.trial import plan

ROWS: list[RowResult] = []
PASSED: list[bool] = []
"""Whether the session passed, once that is known."""
RUNS = 2

Calm = Callable[[], dict[int, str]]


@pytest.fixture(scope="session")
def rows() -> list[RowResult]:
    """What the rows found; printed at the end."""
    return ROWS


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base model and a few images."""
    root = tmp_path_factory.mktemp("world")
    build_base(root / "base")
    build_images(root / "images", count=10)
    return root


@pytest.fixture(scope="session")
def calm(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calm]:
    """Trains the runs without a fault, beside the first row, and is called for their adapters by seed."""
    folder = tmp_path_factory.mktemp("calm")
    sweep = plan(world, folder, f"file://{folder / 'none'}", runs=RUNS)
    (folder / "go").touch()
    environment = {**os.environ, "PYTHONPATH": python_path(chain=True)}
    with contextlib.ExitStack() as stack:
        runs = [
            stack.enter_context(trained_alone(run.spec, folder / f"run-{seed}", environment))
            for seed, run in enumerate(sweep.runs)
        ]
        yield functools.cache(lambda: {seed: digest() for seed, digest in enumerate(runs)})


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NetnsCluster]:
    """A head and three workers with one slot each: whatever falls, there is a free place."""
    if reason := why_no_namespaces():
        pytest.skip(reason)
    with netns_cluster(tmp_path_factory.mktemp("netns"), workers=3) as cluster:
        yield cluster


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not ROWS:
        return
    columns = list(asdict(ROWS[0]))
    table = [columns, *([_shown(value) for value in asdict(row).values()] for row in ROWS)]
    widths = [max(len(line[index]) for line in table) for index in range(len(columns))]
    for line in table:
        terminalreporter.write_line(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        )


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    PASSED.append(exitstatus == pytest.ExitCode.OK)


def pytest_unconfigure(config: pytest.Config) -> None:
    if ROWS:
        print(json.dumps(summary(ROWS, passed=all(PASSED))))


def _shown(value: object) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "NO"
        case float():
            return f"{value:.1f}"
    return str(value)
