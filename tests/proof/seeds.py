"""Plays many seeds in all processes, tells what failed, and replays one: the command of each simulation.

The last line that it prints is one JSON object: ``{"schedules": 100000, "violations": 0}``.
"""

import argparse
import json
import logging
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

CHUNK = 250
SHOWN = 20
"""Of so many failed seeds it is told what failed, of the first one its history too."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one seed."""

    seed: int
    violations: list[str]
    history: list[str]


class Play(Protocol):
    """Lives one seed's history and judges it: a function of a module, for it is sent to processes."""

    def __call__(self, seed: int, *, record: bool = False) -> Verdict: ...


def play_all(play: Play, first: int, count: int, processes: int) -> tuple[int, list[Verdict]]:
    """Play seeds, and return how many failed and the first few of those.

    What is logged is not shown: that a spoilt checkpoint is not used, thousands of times.
    """
    failed, shown = 0, list[Verdict]()
    with ProcessPoolExecutor(processes, initializer=logging.disable) as pool:
        starts = range(first, first + count, CHUNK)
        counts = (min(CHUNK, first + count - start) for start in starts)
        for chunk in pool.map(partial(_chunk, play), starts, counts):
            failed += len(chunk)
            shown += chunk[: max(0, SHOWN - len(shown))]
    return failed, shown


def _chunk(play: Play, first: int, count: int) -> list[Verdict]:
    return [verdict for seed in range(first, first + count) if (verdict := play(seed)).violations]


def tell(play: Play, failed: list[Verdict], again: Callable[[int], str]) -> None:
    """Print what failed, and the history of the first seed of those."""
    for verdict in failed:
        print(f"seed {verdict.seed} (again: {again(verdict.seed)}):")
        for line in verdict.violations:
            print(f"  {line}")
    if failed:
        print(f"the history of seed {failed[0].seed}:")
        for line in play(failed[0].seed, record=True).history:
            print(f"  {line}")


def command(play: Play, target: str, description: str | None) -> int:
    """The simulation's command line; returns its exit status.

    Args:
        target: What ``make`` calls it.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", type=int, default=100_000, help="how many schedules")
    parser.add_argument("--seed", type=int, default=1, help="the first seed; the others follow it")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    chosen = parser.parse_args()
    failed, shown = play_all(play, chosen.seed, chosen.n, chosen.processes)
    tell(play, shown, lambda seed: f"make {target} N=1 SEED={seed}")
    if chosen.n == 1 and not shown:
        print("\n".join(play(chosen.seed, record=True).history))
    print(json.dumps({"schedules": chosen.n, "violations": failed}))
    return 1 if failed else 0
