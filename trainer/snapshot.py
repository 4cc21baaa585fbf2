"""A run's state as files: copied on the training thread, written and hashed on another.

    adapter.safetensors     the trainable parameters, fp32, with the method's configuration in the header
    optimizer.safetensors   the optimizer's state, by parameter name
    state.json              Progress: how far the run is

No random state and no data position: both follow from the step. Nothing is pickled.
"""

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from storage.errors import StorageError
from storage.local import MANIFEST, Manifest, staged_checkpoint, verify

from .config import Frozen
from .errors import BadCheckpoint
from .methods import Method, restore
from .optim import load_optimizer_state, optimizer_state
from .randomness import own_memory
from .tensor_file import read, write

ADAPTER = "adapter.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"


class Progress(Frozen):
    """How far a run is, beside its tensors."""

    version: Literal[1] = 1
    step: int = Field(default=0, ge=0)
    """Optimizer steps done."""
    train_loss: float = 0.0
    """Mean loss of the first hundred steps, from then on a moving average over about as many."""
    sampled_step: int = 0
    """The last step whose samples are drawn."""
    scaler: dict[str, int | float] | None = None
    """State of the fp16 gradient scaler."""


class CheckpointWriter:
    """Writes checkpoints, one at a time.

    ``snapshot`` returns once everything is copied; training may go on while the copy is written. What fails
    in the background is raised by the next ``snapshot`` or ``wait``.
    """

    def __init__(
        self,
        root: Path,
        method: Method,
        optimizer: torch.optim.Optimizer,
        on_written: Callable[[int, float, float], None],
    ) -> None:
        """``on_written`` gets the step, the seconds training stood still, and the seconds of writing."""
        self._root = root
        self._method = method
        self._optimizer = optimizer
        self._on_written = on_written
        self._adapter: dict[str, Tensor] = {}
        self._state: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def snapshot(self, progress: Progress, *, metrics: Mapping[str, float], final: bool) -> None:
        """Copy the run's state and start writing it. Waits for the write before."""
        began = time.monotonic()
        self.wait()
        parameters = self._method.parameters
        self._adapter = _copied({name: p.data for name, p in parameters.items()}, self._adapter)
        self._state = _copied(optimizer_state(self._optimizer, parameters), self._state)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        stall_s = time.monotonic() - began
        self._thread = threading.Thread(
            target=self._write, args=(progress, dict(metrics), final, stall_s), name="checkpoint-writer"
        )
        self._thread.start()

    def wait(self) -> None:
        """Block until nothing is being written.

        Raises:
            Exception: Whatever the last write failed with.
        """
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise error

    def _write(self, progress: Progress, metrics: dict[str, float], final: bool, stall_s: float) -> None:
        try:
            began = time.monotonic()
            with staged_checkpoint(self._root, progress.step, metrics=metrics, final=final) as folder:
                write(folder / ADAPTER, self._adapter, self._method.metadata())
                write(folder / OPTIMIZER, self._state, {})
                (folder / STATE).write_text(progress.model_dump_json(indent=1))
            self._on_written(progress.step, stall_s, time.monotonic() - began)
        except BaseException as error:
            self._error = error


def load_checkpoint(folder: Path, method: Method, optimizer: torch.optim.Optimizer) -> Progress:
    """Restore parameters and optimizer from a checkpoint and return its progress.

    Raises:
        BadCheckpoint: It is incomplete, damaged, or of another run.
    """
    progress = read_progress(folder)
    if problem := restore(method, read_adapter(folder)):
        raise BadCheckpoint(f"{folder / ADAPTER}: {problem}", "it belongs to a run with other settings")
    state = _load(folder / OPTIMIZER)
    if problem := load_optimizer_state(optimizer, method.parameters, state):
        raise BadCheckpoint(f"{folder / OPTIMIZER}: {problem}")
    return progress


def read_progress(folder: Path) -> Progress:
    """Verify every file of a checkpoint against its manifest and return how far it is."""
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
        verify(folder, manifest.files)
        progress = Progress.model_validate_json((folder / STATE).read_bytes())
    except (OSError, StorageError, ValidationError) as error:
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
    except (OSError, SafetensorError) as error:
        raise BadCheckpoint(f"{path}: {error}", "resume from an earlier checkpoint") from error
    return {name: own_memory(tensor) for name, tensor in tensors.items()}


def _copied(tensors: Mapping[str, Tensor], buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors into buffers in main memory, which are allocated the first time only."""
    if buffers.keys() != tensors.keys():
        pinned = torch.cuda.is_available()
        buffers = {n: torch.empty(t.shape, dtype=t.dtype, pin_memory=pinned) for n, t in tensors.items()}
    for name, tensor in tensors.items():
        buffers[name].copy_(tensor, non_blocking=True)
    return buffers
