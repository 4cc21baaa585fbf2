"""The memory plan beside the peak that a GPU measured, by family and by what saves memory.

    python benchmarks/peak_memory.py [--family sd1-512 …] [--save]      # needs a GPU
    python benchmarks/peak_memory.py --family digits --plan             # the plan alone, on any machine

SD 1.5 and SDXL have their real sizes and random weights, see ``random_base.py``; with ``--plan`` not even
those. Each case trains a few steps at batch 1 in bf16 in a process of its own. Measured is what torch had
allocated at its highest (``torch.cuda.max_memory_allocated``), encoding included; ``inference`` draws one
image from the base.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from harness import DIGITS, BenchmarkFailed, conclude, run, show
from random_base import build, describe

FAMILIES = {
    "sd1-512": ("sd1", 512),
    "sdxl-512": ("sdxl", 512),
    "sdxl-1024": ("sdxl", 1024),
    "digits": ("", 32),
}
CUTS = {"sd1": range(7), "sdxl": range(6), "": range(2)}
WAYS: dict[str, dict[str, Any]] = {
    "inference": {},
    "LoRA": {},
    "LoRA, checkpointing": {"gradient_checkpointing": True},
    "LoCon": {"targets": "linear", "conv_rank": 4},
    **{f"LoRA, {kind}": {"quantize": kind} for kind in ("int8", "nf4", "fp8")},
    **{
        f"LoRA, {kind}, checkpointing": {"quantize": kind, "gradient_checkpointing": True}
        for kind in ("nf4", "fp8")
    },
}


@click.group(invoke_without_command=True)
@click.option("--family", "families", multiple=True, type=click.Choice(list(FAMILIES)))
@click.option("--plan", "plan_only", is_flag=True, help="Measure nothing: no GPU and no weights are needed.")
@click.option("--save", is_flag=True, help="Keep the figures under benchmarks/results/.")
@click.pass_context
def main(context: click.Context, families: tuple[str, ...], plan_only: bool, save: bool) -> None:
    import torch

    if context.invoked_subcommand:
        return
    if not plan_only and not torch.cuda.is_available():
        raise BenchmarkFailed("peaks are measured on a CUDA device; --plan works without")
    rows = []
    with tempfile.TemporaryDirectory(prefix="peak-memory-") as scratch:
        for name in families or [name for name in FAMILIES if name != "digits"]:
            family, side = FAMILIES[name]
            made = (
                DIGITS / "base"
                if not family
                else (describe if plan_only else build)(family, Path(scratch) / family)
            )
            for way, keys in {**WAYS, **{f"hollow {n}": {"hollow": n} for n in CUTS[family]}}.items():
                spec = _spec(made, side, way, keys)
                row = {"family": name, "way": way, "plan_mb": _planned_mb(spec, way)}
                if not plan_only:
                    row["peak_mb"] = _measured_mb(spec, way, Path(scratch))
                print(json.dumps(row), file=sys.stderr)
                rows.append(row)
    cells = [[row["family"], row["way"], str(row["plan_mb"]), str(row.get("peak_mb", ""))] for row in rows]
    show("GPU memory, batch 1, bf16, rank 4, AdamW", ["", "", "plan, MB", "peak, MB"], cells)
    conclude("peak_memory", {"rows": rows}, save=save)


def _spec(made: Path, side: int, way: str, keys: dict[str, Any]) -> dict[str, Any]:
    base = {
        "model": str(made),
        "mixed_precision": "bf16",
        "resolution": side,
        "max_train_steps": 3,
        "rank": 4,
    }
    spec: dict[str, Any] = {"base": {**base, **keys}, "dataset": {"path": "images", "val_fraction": 0.0}}
    if way == "inference":
        spec["samples"] = {"prompts": ["a photo"], "steps": 2}
    return spec


def _planned_mb(spec: dict[str, Any], way: str) -> int:
    from trainer.config import RunSpec
    from trainer.memory.estimate import estimate

    plan = estimate(RunSpec.model_validate_json(json.dumps(spec)))
    if way != "inference":
        return round(plan.peak.size / 2**20)
    trained = ("trained parameters", "optimizer")
    return round(sum(need.size for need in plan.phases[-1].needs if need.what not in trained) / 2**20)


def _measured_mb(spec: dict[str, Any], way: str, scratch: Path) -> int:
    words = [
        sys.executable,
        __file__,
        "case",
        json.dumps({"spec": spec, "way": way, "scratch": str(scratch)}),
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchmarkFailed(f"{way}:\n{done.stderr[-3000:]}")
    return int(done.stdout.splitlines()[-1])


@main.command(hidden=True)
@click.argument("given")
def case(given: str) -> None:
    """One case in this process; the last line printed is its peak in MB."""
    import torch
    from real_size import train, write_images

    from trainer.config import RunSpec
    from trainer.sample import sample_images

    wanted = json.loads(given)
    side, scratch = wanted["spec"]["base"]["resolution"], Path(wanted["scratch"])
    images = scratch / f"images-{side}"
    write_images(images, side)
    wanted["spec"]["dataset"]["path"] = str(images)
    spec = RunSpec.model_validate_json(json.dumps(wanted["spec"]))
    torch.cuda.reset_peak_memory_stats()
    if wanted["way"] == "inference":
        sample_images(spec, None, Path(tempfile.mkdtemp(dir=scratch)))
    else:
        train(spec, scratch)
    print(round(torch.cuda.max_memory_allocated() / 2**20))


if __name__ == "__main__":
    run(lambda: main(standalone_mode=False))
