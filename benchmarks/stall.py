"""How long a checkpoint holds up the training thread: ours beside ``accelerate``'s ``save_state``.

    python benchmarks/stall.py [--mb 20 --mb 200] [--repeats 7] [--save]

Both save the same module and the same AdamW state. Ours copies on the training thread and writes on another;
while it writes, the training thread makes optimizer steps, and what these lose to the writer is the figure
``behind_ms``; ``lost_ratio`` counts both. ``save_state`` writes on the training thread. Ours also hashes
every file and flushes it to the disk; ``save_state`` does neither. The lower limit for any method that copies
is a plain copy of as many bytes. The three take turns.
"""

import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from accelerate import Accelerator
from support import BenchmarkFailed, conclude, median, run, show, verdict
from torch import Tensor, nn

from storage.local import complete_checkpoints
from trainer.snapshot import CheckpointWriter, Progress, load_checkpoint

GOAL = 1.0
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


@click.command()
@click.option("--mb", "sizes", type=int, multiple=True, default=(20, 200), show_default=True)
@click.option("--repeats", type=click.IntRange(min=5), default=11, show_default=True)
@click.option("--save", is_flag=True, help="Keep the figures under benchmarks/results/.")
def main(sizes: tuple[int, ...], repeats: int, save: bool) -> None:
    torch.set_num_threads(1)
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
                    "accelerate_ms",
                    "accelerate_max_ms",
                    "copy_ms",
                )
            ),
            verdict(f["ratio"], GOAL),
        ]
        for f in figures
    ]
    columns = ["state", "ours", "max", "behind", "save_state", "max", "copy", "ours / save_state"]
    show(f"training thread stands still, ms, median of {repeats}", columns, rows)
    conclude("stall", {"sizes": figures}, save=save)


def _measure(mb: int, repeats: int) -> dict[str, Any]:
    module = Trained(mb * 10**6, seed=mb)
    optimizer = torch.optim.AdamW(list(module.parameters_by_name.values()))
    optimizer.step()
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(module, optimizer)[1]
    times = Times()
    with tempfile.TemporaryDirectory(prefix="stall-") as scratch:
        ours, theirs = Path(scratch, "ours"), Path(scratch, "theirs")
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


def _copy(method: WholeModule, optimizer: torch.optim.Optimizer, times: Times) -> None:
    size = sum(BYTES_PER_PARAMETER * parameter.numel() for parameter in method.parameters.values())
    source = torch.ones(size, dtype=torch.uint8)
    target = torch.zeros(size, dtype=torch.uint8)
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
