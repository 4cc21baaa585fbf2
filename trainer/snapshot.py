"""A run's state as files: copied on the training thread, written and hashed on another.

    adapter.safetensors     the trainable parameters, fp32, with the method's configuration in the header
    optimizer.safetensors   the optimizer's state, by parameter name; not in the final checkpoint
    state.json              Progress: how far the run is

No random state and no data position: both follow from the step. Nothing is pickled. A disk without room for
a checkpoint loses none that is there: what was superseded goes, and the writing waits for more room.
"""

import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from storage.errors import Corrupt, InvalidName
from storage.local import (
    DISK_FULL,
    DISK_UNUSABLE,
    MANIFEST,
    Manifest,
    free_superseded,
    staged_checkpoint,
    verify,
)

from .config import Frozen
from .errors import BadCheckpoint, DiskFull
from .methods import Methods, restore
from .optim import load_optimizer_state, optimizer_state
from .randomness import own_memory
from .rundir import ADAPTER, OPTIMIZER, STATE
from .tensor_file import read, write

DISK_PATIENCE_S = 900.0
"""How long a checkpoint waits for room on the disk before the attempt ends."""
DISK_PAUSE_S = 5.0
KEPT_FOR_ROOM = (2, 1)
"""How many complete checkpoints stay on a full disk: first the newest two, and if need be the newest."""
_DAMAGE = (
    *(Corrupt, InvalidName, SafetensorError, ValidationError),
    *(FileNotFoundError, NotADirectoryError, IsADirectoryError),
)
"""What is wrong with a checkpoint, wherever it is read. A disk that does not answer, or a process that may
open no more files, says nothing about it."""

_DONE: Future[None] = Future()
_DONE.set_result(None)


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


class CheckpointWriter:
    """Writes checkpoints, one at a time.

    ``snapshot`` returns once everything is copied; training may go on while the copy is written. What fails
    in the background is raised by the next ``snapshot`` or ``wait``.
    """

    def __init__(
        self,
        root: Path,
        methods: Methods,
        optimizer: torch.optim.Optimizer,
        on_written: Callable[[int, float, float], None],
        *,
        on_disk_full: Callable[[str], None] = lambda problem: None,
        give_up: Callable[[], bool] = lambda: False,
        disk_patience_s: float = DISK_PATIENCE_S,
    ) -> None:
        """Begin with nothing written.

        Args:
            on_written: Gets the step, the seconds training stood still, and the seconds of writing.
            on_disk_full: Told once for each checkpoint that has to wait for room.
            give_up: Whether to wait no longer.
        """
        self._root = root
        self._methods = methods
        self._optimizer = optimizer
        self._on_written = on_written
        self._on_disk_full = on_disk_full
        self._give_up = give_up
        self._disk_patience_s = disk_patience_s
        self._waits_for_room = False
        self._adapter: dict[str, Tensor] = {}
        self._state: dict[str, Tensor] = {}
        # One thread, there before it is needed: starting one waits until it runs, which is a stall.
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        self._written: Future[None] = self._writing.submit(lambda: None)

    @property
    def busy(self) -> bool:
        return not self._written.done()

    @property
    def waits_for_room(self) -> bool:
        """Whether the disk is full: training on for long would put more and more work at risk."""
        return self.busy and self._waits_for_room

    def snapshot(self, progress: Progress, *, metrics: Mapping[str, float], final: bool) -> None:
        """Copy the run's state and start writing it. Waits for the write before."""
        began = time.monotonic()
        self.wait()
        parameters = self._methods.parameters
        self._adapter = _copied({name: p.data for name, p in parameters.items()}, self._adapter)
        # Nothing resumes from a final checkpoint, and it is the one that somebody waits for.
        state = {} if final else optimizer_state(self._optimizer, parameters)
        self._state = _copied(state, self._state)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        stall_s = time.monotonic() - began
        self._written = self._writing.submit(self._write, progress, dict(metrics), final, stall_s)

    def wait(self) -> None:
        """Block until nothing is being written.

        Raises:
            Exception: Whatever the last write failed with.
        """
        try:
            self._written.result()
        finally:
            self._written = _DONE

    def _write(self, progress: Progress, metrics: dict[str, float], final: bool, stall_s: float) -> None:
        try:
            began = time.monotonic()
            self._write_patiently(progress, metrics, final)
            self._on_written(progress.step, stall_s, time.monotonic() - began)
        finally:
            self._waits_for_room = False

    def _write_patiently(self, progress: Progress, metrics: dict[str, float], final: bool) -> None:
        """Write a checkpoint, on a full disk once there is room.

        Raises:
            DiskFull: There was none in time, or the disk is read-only.
        """
        deadline = time.monotonic() + self._disk_patience_s
        while True:
            try:
                self._write_once(progress, metrics, final)
                return
            except OSError as error:
                if error.errno not in DISK_UNUSABLE:
                    raise
                if error.errno in DISK_FULL and any(free_superseded(self._root, n) for n in KEPT_FOR_ROOM):
                    continue
                problem = f"{self._root}: {error.strerror}: {_room(self._root)}"
                hint = "make room on the node's disk, or point TMPDIR to a larger one"
                if error.errno not in DISK_FULL or self._give_up() or time.monotonic() > deadline:
                    raise DiskFull(f"DISK_FULL: {problem}", hint) from error
                if not self._waits_for_room:
                    self._waits_for_room = True
                    self._on_disk_full(f"{problem}; {hint}")
            self._pause(DISK_PAUSE_S)

    def _pause(self, pause_s: float) -> None:
        until = time.monotonic() + pause_s
        while time.monotonic() < until and not self._give_up():
            time.sleep(0.05)

    def _write_once(self, progress: Progress, metrics: dict[str, float], final: bool) -> None:
        with staged_checkpoint(self._root, progress.step, metrics=metrics, final=final) as folder:
            write(folder / ADAPTER, self._adapter, self._methods.metadata())
            if not final:
                write(folder / OPTIMIZER, self._state, {})
            (folder / STATE).write_text(progress.model_dump_json(indent=1))


def load_checkpoint(folder: Path, methods: Methods, optimizer: torch.optim.Optimizer) -> Progress:
    """Restore parameters and optimizer from a checkpoint and return its progress.

    Raises:
        BadCheckpoint: It is incomplete, damaged, or of another run.
        OSError, Unavailable: It cannot be read here and now.
    """
    progress = read_progress(folder)
    if problem := restore(methods, read_adapter(folder)):
        raise BadCheckpoint(f"{folder / ADAPTER}: {problem}", "it belongs to a run with other settings")
    state = _load(folder / OPTIMIZER)
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


def _room(root: Path) -> str:
    """What is left on a disk, in words."""
    try:
        there = os.statvfs(root)
    except OSError as error:
        return str(error)
    free = f"{there.f_bavail * there.f_frsize / 1e6:.1f} MB"
    return f"{free} and {there.f_favail} more files fit" if there.f_files else f"{free} free"


def _copied(tensors: Mapping[str, Tensor], buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors into buffers in main memory, which are allocated the first time only."""
    if buffers.keys() != tensors.keys():
        pinned = torch.cuda.is_available()
        buffers = {n: torch.empty(t.shape, dtype=t.dtype, pin_memory=pinned) for n, t in tensors.items()}
    for name, tensor in tensors.items():
        buffers[name].copy_(tensor, non_blocking=True)
    return buffers
