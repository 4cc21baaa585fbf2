"""Checkpoints of adapters that change what a base computes, made without training."""

from pathlib import Path

import torch

from storage.local import staged_checkpoint
from trainer.config import RunSpec
from trainer.families import load_family
from trainer.methods import attach
from trainer.rundir import ADAPTER, STATE
from trainer.snapshot import Progress
from trainer.tensor_file import write


def adapted_checkpoint(spec: RunSpec, folder: Path, *, step: int = 3, size: float = 0.3) -> Path:
    """Write a final checkpoint of the spec's adapter with random numbers, and return its folder."""
    methods = attach(spec.base, load_family(spec.base))
    numbers = torch.Generator().manual_seed(5)
    tensors = {
        name: parameter.data + size * torch.randn(parameter.shape, generator=numbers)
        for name, parameter in methods.parameters.items()
    }
    with staged_checkpoint(folder, step, metrics={}, final=True) as staged:
        write(staged / ADAPTER, tensors, methods.metadata())
        (staged / STATE).write_text(Progress(step=step).model_dump_json())
    return folder / f"step-{step:09d}"
