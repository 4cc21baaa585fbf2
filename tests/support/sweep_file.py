"""A sweep file of two parameters."""

from collections.abc import Callable
from pathlib import Path

GRID = """\
method: grid
parameters:
  learning_rate: {values: [5e-5, 1e-4]}
  rank: {values: [8, 16]}
  alpha: {value: "${parameters.rank}"}
base: {model: owner/model}
dataset: {path: data}
"""

Write = Callable[..., Path]
