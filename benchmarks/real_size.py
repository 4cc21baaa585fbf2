"""Peak memory and steps per second by family and adapter, beside diffusers' recipe.

    python benchmarks/real_size.py [--family sd1 --family sdxl] [--steps 20] [--save]   # needs a GPU
    python benchmarks/real_size.py --family digits --family small-sdxl --adapter all    # on any machine

SD 1.5 and SDXL have their real sizes and random weights, see ``random_base.py``.

Ours beside diffusers' recipe: what its LoRA training scripts do (``examples/text_to_image`` there),
with the same adapter, batch and precision. Ours has latents and text states cached and the encoders freed,
as every run has; the recipe encodes images and captions in each step with encoders that stay on the device,
and hollows nothing.
Every case runs in a process of its own, the contenders in turn; a step's time is the median of the last ones.
Memory is what torch had allocated at its highest (``torch.cuda.max_memory_allocated``), loading included.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from harness import DIGITS, BenchmarkFailed, conclude, run, show
from random_base import build

WARM_UP = 5
RANK = 4
RESOLUTION = {"sd1": 512, "sdxl": 1024, "digits": 32, "small-sdxl": 64}
ON_ANY_MACHINE = {"digits", "small-sdxl"}
LINEAR = {"targets": "linear"}
ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "LoCon": {**LINEAR, "conv_rank": RANK},
    "DoRA": {"use_dora": True},
    "LoHa": {**LINEAR, "adapter": "loha"},
    "LoKr": {**LINEAR, "adapter": "lokr"},
    **{f"LoRA, hollowed at {cut}": {"hollow": cut} for cut in range(4)},
}
BATCHES = (1, 4)


@click.group(invoke_without_command=True)
@click.option("--family", "families", multiple=True, type=click.Choice(list(RESOLUTION)))
@click.option("--adapter", "adapters", multiple=True, type=click.Choice([*ADAPTERS, "all"]))
@click.option("--steps", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--save", is_flag=True, help="Keep the figures under benchmarks/results/.")
@click.pass_context
def main(
    context: click.Context, families: tuple[str, ...], adapters: tuple[str, ...], steps: int, save: bool
) -> None:
    import torch

    if context.invoked_subcommand:
        return
    wanted = families or ("sd1", "sdxl")
    if not torch.cuda.is_available() and not set(wanted) <= ON_ANY_MACHINE:
        raise BenchmarkFailed(f"the real sizes need a CUDA device; {sorted(ON_ANY_MACHINE)} run everywhere")
    chosen = list(ADAPTERS) if "all" in adapters else (adapters or ("LoRA", "LoCon"))
    rows = []
    with tempfile.TemporaryDirectory(prefix="real-size-") as scratch:
        for family in wanted:
            base = DIGITS / "base" if family == "digits" else build(family, Path(scratch) / family)
            for adapter in chosen:
                for batch in BATCHES:
                    case = {"family": family, "adapter": adapter, "batch": batch}
                    rows.append({**case, **_compared(base, case, steps, Path(scratch))})
    _show(rows)
    conclude("real_size", {"steps": steps, "rows": rows}, save=save)


def _compared(base: Path, case: dict[str, Any], steps: int, scratch: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for contender in ("ours", "diffusers"):
        given = json.dumps({**case, "base": str(base), "steps": steps, "scratch": str(scratch)})
        words = [sys.executable, __file__, "case", contender, given]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BenchmarkFailed(f"{contender} {case}:\n{done.stderr[-3000:]}")
        for name, value in json.loads(done.stdout.splitlines()[-1]).items():
            found[f"{contender}_{name}"] = value
    found["speed_ratio"] = round(found["ours_steps_per_s"] / found["diffusers_steps_per_s"], 3)
    if found["diffusers_peak_mb"]:
        found["memory_ratio"] = round(found["ours_peak_mb"] / found["diffusers_peak_mb"], 3)
    return found


@main.command(hidden=True)
@click.argument("contender", type=click.Choice(["ours", "diffusers"]))
@click.argument("given")
def case(contender: str, given: str) -> None:
    """One case in this process; the last line printed is one JSON object."""
    import torch

    wanted = json.loads(given)
    steps_s = (_ours if contender == "ours" else _diffusers)(wanted)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    rate = 1 / statistics.median(steps_s[WARM_UP:])
    print(json.dumps({"steps_per_s": round(rate, 3), "peak_mb": round(peak / 2**20)}))


def _precision() -> str:
    import torch

    return "bf16" if torch.cuda.is_available() else "no"


def _ours(wanted: dict[str, Any]) -> list[float]:
    """Train through the real loop, on images and captions that are random where the cache would have them."""
    from trainer.config import RunSpec

    side = RESOLUTION[wanted["family"]]
    images = Path(wanted["scratch"]) / f"images-{side}"
    write_images(images, side)
    spec = RunSpec.model_validate_json(
        json.dumps(
            {
                "base": {
                    "model": wanted["base"],
                    "mixed_precision": _precision(),
                    "resolution": side,
                    "train_batch_size": wanted["batch"],
                    "max_train_steps": WARM_UP + wanted["steps"],
                    "rank": RANK,
                    **ADAPTERS[wanted["adapter"]],
                },
                "dataset": {"path": str(images), "val_fraction": 0.0},
            }
        )
    )
    return train(spec, Path(wanted["scratch"]))


def train(spec: Any, scratch: Path) -> list[float]:
    """Train a run to its end in this process and return what each step took, in seconds."""
    import torch

    from trainer.attempt import run_attempt
    from trainer.rundir import CheckpointPolicy, Options, RunDir, StartOrder, read_events
    from trainer.stop import Stop

    run_dir = RunDir(Path(tempfile.mkdtemp(dir=scratch)))
    run_dir.checkpoints.mkdir(parents=True)
    run_dir.spec.write_text(spec.model_dump_json())
    options = Options(cache_dir=f"{scratch}/cache", checkpoint=CheckpointPolicy(every_s=None))
    run_dir.options.write_text(options.model_dump_json())
    run_dir.order_start(StartOrder(resume=None))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if code := run_attempt(run_dir, Stop()):
        raise BenchmarkFailed(f"exit code {code}")
    return [event["step_s"] for _, event in read_events(run_dir.events) if event["event"] == "step"]


def write_images(folder: Path, side: int) -> None:
    import numpy as np
    from PIL import Image

    if folder.exists():
        return
    folder.mkdir()
    noise = np.random.default_rng(0)
    for n in range(8):
        Image.fromarray(noise.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"a photo, number {n}")


def _diffusers(wanted: dict[str, Any]) -> list[float]:
    """What diffusers' scripts do in a step: encode, noise, predict, clip, AdamW, under accelerate."""
    import torch
    from accelerate import Accelerator
    from diffusers import DDPMScheduler, DiffusionPipeline
    from diffusers.training_utils import cast_training_params

    accelerator = Accelerator(mixed_precision=_precision())
    dtype = torch.bfloat16 if _precision() == "bf16" else torch.float32
    pipeline = DiffusionPipeline.from_pretrained(wanted["base"], torch_dtype=dtype)
    pipeline.to(accelerator.device)
    pipeline.vae.to(torch.float32)  # SDXL's overflows in half precision: its script keeps it in fp32
    networks = (pipeline.unet, pipeline.vae, pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None))
    for network in networks:
        if network is not None:
            network.requires_grad_(False)
    pipeline.unet.add_adapter(_peft_config(ADAPTERS[wanted["adapter"]]))
    if dtype is not torch.float32:
        cast_training_params(pipeline.unet, dtype=torch.float32)
    trained = [parameter for parameter in pipeline.unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-2)
    unet, optimizer = accelerator.prepare(pipeline.unet, optimizer)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    side, batch = RESOLUTION[wanted["family"]], wanted["batch"]
    unet.train()
    took_s = []
    for _ in range(WARM_UP + wanted["steps"]):
        began = time.perf_counter()
        pixels = torch.rand(batch, 3, side, side, device=accelerator.device) * 2 - 1
        with torch.no_grad():
            latents = pipeline.vae.encode(pixels).latent_dist.sample() * pipeline.vae.config.scaling_factor
            states, added = _encoded(pipeline, batch, side)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(1000, (batch,), device=latents.device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        with accelerator.autocast():
            predicted = unet(noisy, timesteps, encoder_hidden_states=states, added_cond_kwargs=added).sample
            loss = torch.nn.functional.mse_loss(predicted.float(), noise.float())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        float(loss)
        took_s.append(time.perf_counter() - began)
    return took_s


def _peft_config(chosen: dict[str, Any]) -> Any:
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    from trainer.config.layer_sizes import UNET_TARGETS

    targets = [
        *UNET_TARGETS[chosen.get("targets", "attention")],
        *(UNET_TARGETS["conv"] if "conv_rank" in chosen else ()),
    ]
    match chosen.get("adapter", "lora"):
        case "loha":
            return LoHaConfig(r=RANK, alpha=RANK, target_modules=targets)
        case "lokr":
            return LoKrConfig(r=RANK, alpha=RANK, target_modules=targets)
    return LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        init_lora_weights="gaussian",
        target_modules=targets,
        use_dora="use_dora" in chosen,
    )


def _encoded(pipeline: Any, batch: int, side: int) -> tuple[Any, dict[str, Any]]:
    import torch

    prompts = ["a photo of a cat"] * batch
    device = pipeline.unet.device
    if getattr(pipeline, "text_encoder_2", None) is None:
        return pipeline.encode_prompt(prompts, device, 1, False)[0], {}
    states, _, pooled, _ = pipeline.encode_prompt(
        prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    sizes = torch.tensor([[side, side, 0, 0, side, side]] * batch, device=device, dtype=states.dtype)
    return states, {"text_embeds": pooled, "time_ids": sizes}


def _show(rows: list[dict[str, Any]]) -> None:
    cells = [
        [
            f"{row['family']}, {row['adapter']}, batch {row['batch']}",
            f"{row['ours_steps_per_s']:.2f}",
            f"{row['diffusers_steps_per_s']:.2f}",
            f"{row['speed_ratio']:.2f}",
            f"{row['ours_peak_mb']}",
            f"{row['diffusers_peak_mb']}",
        ]
        for row in rows
    ]
    columns = ["", "steps/s", "diffusers'", "ratio", "peak MB", "diffusers'"]
    show("ours beside diffusers' recipe, random weights", columns, cells)


if __name__ == "__main__":
    run(lambda: main(standalone_mode=False))
