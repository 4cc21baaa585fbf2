"""Writes checkpoints: copied on the training thread, written and hashed on another.

A disk without room for a checkpoint loses none that is there: what was superseded goes, and the writing waits
for more room.
"""

import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from storage.local import DISK_FULL, DISK_UNUSABLE, free_superseded, staged_checkpoint

from .average import Average
from .errors import DiskFull
from .methods import Methods
from .rundir import ADAPTER, OPTIMIZER, STATE
from .snapshot import Progress, used_and_kept
from .tensor_file import write

DISK_PATIENCE_S = 900.0
"""How long a checkpoint waits for room on the disk before the attempt ends."""
DISK_PAUSE_S = 5.0
KEPT_FOR_ROOM = (2, 1)
"""How many complete checkpoints stay on a full disk: first the newest two, and if need be the newest."""

_DONE: Future[None] = Future()
_DONE.set_result(None)


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
        average: Average | None = None,
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
        self._average = average
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
        adapter, state = used_and_kept(self._methods, self._optimizer, self._average)
        self._adapter = _copied(adapter, self._adapter)
        # Nothing resumes from a final checkpoint, and it is the one that somebody waits for.
        self._state = _copied({} if final else state, self._state)
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
