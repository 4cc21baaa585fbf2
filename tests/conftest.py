"""Makes ``tests/support`` importable as ``support``, and skips what this machine cannot run."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch  # here: most tests need no torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
