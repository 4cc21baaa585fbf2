"""A run's state, and how it is read from the files of a checkpoint; ``writing`` writes them.

    adapter.safetensors     what is to be used, fp32, with the method's configuration in the header: the
                            trainable parameters, or their moving averages
    optimizer.safetensors   the optimizer's state, by parameter name, and beside averages the parameters
                            themselves; not in the final checkpoint
    state.json              Progress: how far the run is

No random state and no data position: both follow from the step. Nothing is pickled.
"""

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from storage.errors import Corrupt, InvalidName
from storage.local import MANIFEST, Manifest, verify

from .average import Average
from .config import Frozen
from .errors import BadCheckpoint
from .methods import Methods, restore
from .optim import SEPARATOR, load_optimizer_state, optimizer_state
from .randomness import own_memory
from .rundir import ADAPTER, OPTIMIZER, STATE
from .tensor_file import read

RAW = f"{SEPARATOR}parameter"
"""Ends the name of what a parameter itself was, where the adapter holds its average."""
_DAMAGE = (
    *(Corrupt, InvalidName, SafetensorError, ValidationError),
    *(FileNotFoundError, NotADirectoryError, IsADirectoryError),
)
"""What is wrong with a checkpoint, wherever it is read. A disk that does not answer, or a process that may
open no more files, says nothing about it."""


class Progress(Frozen):
    """How far a run is, beside its tensors."""

    version: Literal[1] = 1
    step: int = Field(default=0, ge=0)
    """Optimizer steps done."""
    train_loss: float = 0.0
    """Mean loss of the first hundred steps, from then on a moving average over about as many."""
    validated_step: int = 0
    """The last step whose validation is done; 0 in what was written before there was this field."""
    sampled_step: int = 0
    """The last step whose samples are drawn."""
    scaler: dict[str, int | float] | None = None
    """State of the fp16 gradient scaler."""


def used_and_kept(
    methods: Methods, optimizer: torch.optim.Optimizer, average: Average | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what goes into a checkpoint's adapter and beside it. The tensors change with the next step."""
    own = {name: parameter.data for name, parameter in methods.parameters.items()}
    state = optimizer_state(optimizer, methods.parameters)
    if average is None:
        return own, state
    return average.tensors, state | {f"{name}{RAW}": tensor for name, tensor in own.items()}


def load_checkpoint(
    folder: Path, methods: Methods, optimizer: torch.optim.Optimizer, average: Average | None = None
) -> Progress:
    """Restore parameters, averages and optimizer from a checkpoint and return its progress.

    Raises:
        BadCheckpoint: It is incomplete, damaged, or of another run.
        OSError, Unavailable: It cannot be read here and now.
    """
    progress = read_progress(folder)
    if problem := restore(methods, read_adapter(folder)):
        raise BadCheckpoint(f"{folder / ADAPTER}: {problem}", "it belongs to a run with other settings")
    state = _load(folder / OPTIMIZER)
    raw = {name: state.pop(name) for name in [*state] if name.endswith(RAW)}
    if raw or average:
        problem = "it holds averages" if average is None else average.restored(_without(RAW, raw))
        if problem:
            raise BadCheckpoint(f"{folder / OPTIMIZER}: {problem}", "base.ema_decay was another one")
    if problem := load_optimizer_state(optimizer, methods.parameters, state):
        raise BadCheckpoint(f"{folder / OPTIMIZER}: {problem}")
    return progress


def read_progress(folder: Path) -> Progress:
    """Verify every file of a checkpoint against its manifest and return how far it is.

    Raises:
        BadCheckpoint: It is incomplete or damaged.
        OSError, Unavailable: It cannot be read here and now.
    """
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
        verify(folder, manifest.files)
        progress = Progress.model_validate_json((folder / STATE).read_bytes())
    except _DAMAGE as error:
        raise BadCheckpoint(f"{folder}: {error}", "resume from an earlier checkpoint") from error
    if progress.step != manifest.step:
        raise BadCheckpoint(f"{folder}: its manifest says step {manifest.step}, its state {progress.step}")
    return progress


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """Return the trained tensors of a checkpoint."""
    tensors = _load(folder / ADAPTER)
    if odd := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise BadCheckpoint(f"{folder / ADAPTER}: {odd[0]} holds NaN or infinity")
    return tensors


def _load(path: Path) -> dict[str, Tensor]:
    try:
        tensors, _ = read(path)
    except _DAMAGE as error:
        raise BadCheckpoint(f"{path}: {error}", "resume from an earlier checkpoint") from error
    return {name: own_memory(tensor) for name, tensor in tensors.items()}


def _without(ending: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removesuffix(ending): tensor for name, tensor in tensors.items()}
