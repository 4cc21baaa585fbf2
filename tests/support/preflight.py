"""A sweep file whose data, model, programs and store are looked at before anything is launched."""

from collections.abc import Callable
from pathlib import Path

GRID = """\
parameters: {learning_rate: {values: [1e-4, 2e-4]}}
base: {model: owner/model, revision: abc, resolution: 32}
dataset: {path: data}
"""
Check = Callable[..., list[str]]


def lose_captions(data: Path) -> None:
    (data / "1.txt").unlink()
    (data / "3.txt").unlink()
