"""Adapters that change what a base computes, made without training: as a file, and in a checkpoint."""

from pathlib import Path
from typing import Any

import torch

from storage.local import staged_checkpoint
from trainer.config import Base, RunSpec
from trainer.families import load_family
from trainer.methods import attach
from trainer.rundir import ADAPTER, STATE
from trainer.snapshot import Progress
from trainer.tensor_file import write


def write_adapter(model: Path, file: Path, *, seed: int = 0, size: float = 0.05, **keys: Any) -> Path:
    """Write an adapter with random numbers as a checkpoint has it, and return its file.

    Args:
        keys: Settings of a run's ``base``.
    """
    _write(Base(model=str(model), **keys), file, seed=seed, size=size)
    return file


def adapted_checkpoint(spec: RunSpec, folder: Path, *, step: int = 3, size: float = 0.3) -> Path:
    """Write a final checkpoint of the spec's adapter with random numbers, and return its folder."""
    with staged_checkpoint(folder, step, metrics={}, final=True) as staged:
        _write(spec.base, staged / ADAPTER, seed=5, size=size)
        (staged / STATE).write_text(Progress(step=step).model_dump_json())
    return folder / f"step-{step:09d}"


def _write(base: Base, file: Path, *, seed: int, size: float) -> None:
    methods = attach(base, load_family(base))
    numbers = torch.Generator().manual_seed(seed)
    tensors = {
        name: parameter.data + size * torch.randn(parameter.shape, generator=numbers)
        for name, parameter in methods.parameters.items()
    }
    write(file, tensors, methods.metadata())
