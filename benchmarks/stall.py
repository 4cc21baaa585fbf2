"""How long a checkpoint holds up the training thread: ours beside ``accelerate``'s ``save_state`` and torch's
``async_save``.

    python benchmarks/stall.py [--mb 20 --mb 200 --mb 1000] [--repeats 11] [--save]

All save the same module and the same AdamW state. Ours copies on the training thread and writes on another;
while it writes, the training thread makes optimizer steps, and what these lose to the writer is the figure
``behind_ms``; ``lost_ratio`` counts both. ``async_save`` does much the same, and is waited for before the
next takes its turn; ``save_state`` writes on the training thread. Ours also hashes every file and flushes it
to the disk; ``save_state`` does neither. The lower limit for any method that copies is a plain copy of as
many bytes, into memory that was written before. The goal is a tenth of a synchronous save that is as durable
as ours: ``torch.save`` and a flush to the disk. All take turns.

``upload``: steps of one thread, by turns beside nothing and beside a process that packs and sends checkpoints
without a pause, as the agent does it. That is the worst case: a real link is slower than its packing.
"""

import contextlib
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from harness import BenchmarkFailed, conclude, median, run, show, verdict
from torch import Tensor, nn

from storage import layout
from storage.directory import DirectoryStore
from storage.local import complete_checkpoints
from storage.replicator import NICENESS
from storage.uploading import Uploader
from trainer.snapshot import Progress, load_checkpoint
from trainer.writing import CheckpointWriter

GOAL = 0.1
"""Of the synchronous save."""
COPIES_GOAL, COPIES_GOAL_MS = 1.5, 2.0
"""So many plain copies, and so many milliseconds."""
INFLATION_GOAL = 1.02
BYTES_PER_PARAMETER = 12
"""fp32, and AdamW's two averages."""
TENSOR_SIZE = 32 * 1024
"""Elements of one LoRA factor of a usual size (32 × 1024): the state consists of many such tensors."""


class Trained(nn.Module):
    """Parameters as a method holds them, with gradients that make every optimizer step move."""

    def __init__(self, state_bytes: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        count = max(1, round(state_bytes / BYTES_PER_PARAMETER / TENSOR_SIZE))
        self.factors = nn.ParameterList(torch.randn(32, 1024, generator=generator) for _ in range(count))
        for factor in self.factors:
            factor.grad = torch.randn(factor.shape, generator=generator)

    @property
    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        return dict(sorted(self.named_parameters()))


class WholeModule:
    """``trainer.methods.Method`` over all of a module."""

    def __init__(self, module: Trained) -> None:
        self.parameters = module.parameters_by_name

    def metadata(self) -> dict[str, str]:
        return {}


@dataclass
class Times:
    """Milliseconds, one for each checkpoint."""

    ours: list[float] = field(default_factory=list)
    behind: list[float] = field(default_factory=list)
    write: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    copy: list[float] = field(default_factory=list)
    dcp: list[float] = field(default_factory=list)
    synchronous: list[float] = field(default_factory=list)


@click.command()
@click.option("--mb", "sizes", type=int, multiple=True, default=(20, 200, 1000), show_default=True)
@click.option("--repeats", type=click.IntRange(min=5), default=11, show_default=True)
@click.option("--save", is_flag=True, help="Keep the figures under benchmarks/results/.")
def main(sizes: tuple[int, ...], repeats: int, save: bool) -> None:
    torch.set_num_threads(1)
    with _process_group():
        figures = [_measure(mb, repeats) for mb in sizes]
    rows = [
        [
            f"{f['mb']} MB",
            *(
                f"{f[key]:.1f}"
                for key in (
                    "ours_ms",
                    "ours_max_ms",
                    "behind_ms",
                    "async_save_ms",
                    "accelerate_ms",
                    "accelerate_max_ms",
                    "synchronous_ms",
                    "copy_ms",
                )
            ),
            f"{f['copies']:.2f}{'' if f['copies_goal_met'] else ' MISSED'}",
            verdict(f["synchronous_ratio"], GOAL),
        ]
        for f in figures
    ]
    columns = [
        *("state", "ours", "max", "behind", "async_save", "save_state", "max", "torch.save + fsync", "copy"),
        "copies",
        "ours / synchronous",
    ]
    show(f"training thread stands still, ms, median of {repeats}", columns, rows)
    upload = _inflation(repeats)
    show(
        f"a step of {upload['step_ms']:.1f} ms beside packing and sending, on {upload['cores']} cores "
        f"under a load of {upload['load']}",
        ["", "times as long"],
        [["median of turns", verdict(upload["inflation"], INFLATION_GOAL)]],
    )
    conclude("stall", {"sizes": figures, "upload": upload}, save=save)


def _measure(mb: int, repeats: int) -> dict[str, Any]:
    module = Trained(mb * 10**6, seed=mb)
    optimizer = torch.optim.AdamW(list(module.parameters_by_name.values()))
    optimizer.step()
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(module, optimizer)[1]
    times = Times()
    with tempfile.TemporaryDirectory(prefix="stall-") as scratch:
        ours, theirs, torchs = Path(scratch, "ours"), Path(scratch, "theirs"), Path(scratch, "dcp")
        ours.mkdir()
        method = WholeModule(module)
        writer = CheckpointWriter(
            ours, method, optimizer, lambda step, stall_s, write_s: times.write.append(1000 * write_s)
        )
        first_ms = 0.0
        for number in range(repeats + 1):
            _ours(writer, optimizer, number, times)
            if number == 0:  # allocates its buffers; shown apart
                first_ms = times.ours[0]
                _check_restored(ours, method, optimizer)
            shutil.rmtree(ours / f"step-{number:09d}")
            _theirs(accelerator, theirs, times)
            _torchs(module, optimizer, torchs, times)
            _synchronous(module, optimizer, Path(scratch, "synchronous"), times)
            _copy(method, optimizer, times)
        del prepared
    return _figures(mb, times, first_ms)


def _ours(writer: CheckpointWriter, optimizer: torch.optim.Optimizer, step: int, times: Times) -> None:
    step_ms = statistics.median(_timed(optimizer.step) for _ in range(5))
    times.ours.append(_timed(lambda: writer.snapshot(Progress(step=step), metrics={}, final=False)))
    steps, began = 0, time.perf_counter()
    while writer.busy:
        optimizer.step()
        steps += 1
    times.behind.append(1000 * (time.perf_counter() - began) - steps * step_ms)
    writer.wait()


def _theirs(accelerator: Accelerator, folder: Path, times: Times) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    times.theirs.append(_timed(lambda: accelerator.save_state(str(folder))))


def _torchs(module: Trained, optimizer: torch.optim.Optimizer, folder: Path, times: Times) -> None:
    """What ``async_save`` keeps its caller waiting for; its thread is then waited for outside of the time."""
    shutil.rmtree(folder, ignore_errors=True)
    state = {"module": module.state_dict(), "optimizer": optimizer.state_dict()}
    pending: list[Any] = []
    times.dcp.append(_timed(lambda: pending.append(dcp.async_save(state, checkpoint_id=str(folder)))))
    pending[0].result()


def _synchronous(module: Trained, optimizer: torch.optim.Optimizer, path: Path, times: Times) -> None:
    def save() -> None:
        with path.open("wb") as file:
            torch.save({"module": module.state_dict(), "optimizer": optimizer.state_dict()}, file)
            file.flush()
            os.fsync(file.fileno())

    times.synchronous.append(_timed(save))
    path.unlink()


@contextlib.contextmanager
def _process_group() -> Any:
    """``async_save`` wants one, even of one process."""
    with tempfile.TemporaryDirectory(prefix="stall-") as scratch:
        store = dist.FileStore(str(Path(scratch, "store")), 1)
        dist.init_process_group("gloo", rank=0, world_size=1, store=store)
        try:
            yield
        finally:
            dist.destroy_process_group()


def _inflation(repeats: int) -> dict[str, Any]:
    """Compare steps with nothing beside them and beside an uploading process, turn by turn."""
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(768, 768, generator=generator)

    def step() -> None:
        for _ in range(4):
            matrix @ matrix

    spawn = multiprocessing.get_context("spawn")
    ratios, alone_ms = [], []
    with tempfile.TemporaryDirectory(prefix="stall-") as scratch:
        go, done, idle = spawn.Event(), spawn.Event(), spawn.Event()
        uploader = spawn.Process(target=_upload, args=(Path(scratch), go, done, idle), daemon=True)
        uploader.start()
        try:
            for _ in range(repeats):
                if not idle.wait(120):
                    raise BenchmarkFailed("the uploading process did not come to rest")
                alone = statistics.median(_timed(step) for _ in range(30))
                idle.clear()
                go.set()
                beside = statistics.median(_timed(step) for _ in range(30))
                go.clear()
                ratios.append(beside / alone)
                alone_ms.append(alone)
        finally:
            done.set()
            go.set()
            uploader.join(60)
    return {
        "inflation": median(ratios),
        "inflation_max": round(max(ratios), 3),
        "step_ms": median(alone_ms),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
    }


def _upload(scratch: Path, go: Any, done: Any, idle: Any) -> None:
    """In a process of its own, and nice: pack and send checkpoints into a folder, while told to go."""
    store = DirectoryStore(scratch / "store")
    module = Trained(60 * 10**6, seed=1)
    optimizer = torch.optim.AdamW(module.parameters())
    optimizer.step()
    root = scratch / "checkpoints"
    root.mkdir()
    writer = CheckpointWriter(root, WholeModule(module), optimizer, lambda *seconds: None)
    writer.snapshot(Progress(step=1), metrics={}, final=False)
    writer.wait()
    local = complete_checkpoints(root)[0]
    os.nice(NICENESS)
    idle.set()
    attempt = 0
    while go.wait() and not done.is_set():
        attempt += 1
        prefix = layout.checkpoint_prefix("stall", attempt, "0" * 8, local.step)
        # Each time anew, as one that knows nothing of its link yet, and so packs.
        Uploader(store).upload(local, local.manifest.files, prefix)
        shutil.rmtree(scratch / "store" / "runs")
        if not go.is_set():
            idle.set()


def _copy(method: WholeModule, optimizer: torch.optim.Optimizer, times: Times) -> None:
    size = sum(BYTES_PER_PARAMETER * parameter.numel() for parameter in method.parameters.values())
    source = torch.ones(size, dtype=torch.uint8)
    target = torch.zeros(size, dtype=torch.uint8).fill_(1)
    times.copy.append(_timed(lambda: target.copy_(source)))


def _check_restored(root: Path, method: WholeModule, optimizer: torch.optim.Optimizer) -> None:
    """Show that steps made during the writing are not in a checkpoint, and that it leads to the same ones."""
    checkpoint = complete_checkpoints(root)[0].path
    other = Trained(BYTES_PER_PARAMETER * sum(p.numel() for p in method.parameters.values()), seed=0)
    fresh = torch.optim.AdamW(list(other.parameters_by_name.values()))
    load_checkpoint(checkpoint, WholeModule(other), fresh)
    steps = {float(state["step"]) for state in fresh.state.values()}
    if steps != {1.0 + 5}:
        raise BenchmarkFailed(f"the checkpoint holds optimizer steps {sorted(steps)}, expected 6 everywhere")
    for parameter, restored in zip(
        method.parameters.values(), other.parameters_by_name.values(), strict=True
    ):
        restored.grad = parameter.grad
    behind = float(optimizer.state[next(iter(method.parameters.values()))]["step"])
    for _ in range(int(behind) - 6):
        fresh.step()
    if not all(map(_equal, method.parameters.values(), other.parameters_by_name.values())):
        raise BenchmarkFailed(
            "a run restored from the checkpoint does not retrace the steps of the one saved"
        )


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other)


def _figures(mb: int, times: Times, first_ms: float) -> dict[str, Any]:
    ours, theirs = times.ours[1:], times.theirs[1:]
    return {
        "mb": mb,
        "ours_ms": median(ours),
        "accelerate_ms": median(theirs),
        "ratio": median([a / b for a, b in zip(ours, theirs, strict=True)]),
        "lost_ratio": median([(a + c) / b for a, b, c in zip(ours, theirs, times.behind[1:], strict=True)]),
        "copy_ms": median(times.copy[1:]),
        "async_save_ms": median(times.dcp[1:]),
        "synchronous_ms": median(times.synchronous[1:]),
        "synchronous_ratio": median([a / b for a, b in zip(ours, times.synchronous[1:], strict=True)]),
        "copies": median([a / b for a, b in zip(ours, times.copy[1:], strict=True)]),
        "copies_goal_met": median(ours) <= COPIES_GOAL * median(times.copy[1:]) + COPIES_GOAL_MS,
        "ours_max_ms": round(max(ours), 3),
        "ours_first_ms": round(first_ms, 3),
        "accelerate_max_ms": round(max(theirs), 3),
        "behind_ms": median(times.behind[1:]),
        "write_ms": median(times.write[1:]),
        "checkpoints": len(ours),
    }


def _timed(call: Any) -> float:
    began = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - began)


if __name__ == "__main__":
    run(lambda: main(standalone_mode=False))
