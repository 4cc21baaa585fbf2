"""Sample images: DPM-Solver multistep with classifier-free guidance, one generator per image.

An image is decided by prompt, seed and weights: seeds of a prompt are drawn together only for speed. A seed
gives the same starting noise as ``torch.Generator().manual_seed(seed)`` in diffusers.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from storage.local import remove_stale, step_dir, temporary_dir

from .config import Base, RunSpec, Samples
from .dataset.folder import fill_trigger
from .errors import BadCheckpoint, BadInput
from .families import Family, load_family
from .methods import Methods, attach, restore
from .rundir import ADAPTER
from .snapshot import read_adapter, read_progress
from .stop import Stop
from .texts import LiveTexts, Texts
from .validate import evaluating

INDEX = "index.json"
_TOGETHER = 8
"""Images of one prompt that are denoised together."""


@dataclass(frozen=True, slots=True)
class SampleImage:
    prompt: str
    seed: int
    image: Image.Image


def prompts(spec: RunSpec) -> list[str]:
    """The prompts of a run as the model sees them, ``[trigger]`` replaced."""
    return [fill_trigger(p, spec.dataset.trigger) for p in spec.samples.prompts] if spec.samples else []


def sample_texts(spec: RunSpec) -> list[str]:
    """Every text that must be encoded to draw a run's samples."""
    return [*prompts(spec), spec.samples.negative] if spec.samples else []


def draw_images(family: Family, spec: RunSpec, texts: Texts, stop: Stop) -> Iterator[SampleImage]:
    """Yield the run's sample images from the family as it is now, prompt by prompt, seed by seed.

    Raises:
        Stopped: A stop was requested meanwhile.
    """
    samples = spec.samples
    assert samples is not None
    side = spec.base.resolution // family.latent_pixels
    for prompt in prompts(spec):
        for first in range(0, len(samples.seeds), _TOGETHER):
            seeds = samples.seeds[first : first + _TOGETHER]
            with evaluating(family):
                latents_BCHW = _denoise(family, samples, seeds, (side, side), prompt, texts, stop)
                images = [_to_image(family.decode(latents_CHW)) for latents_CHW in latents_BCHW]
            for seed, image in zip(seeds, images, strict=True):
                yield SampleImage(prompt, seed, image)
    family.rest_vae()


def write_samples(root: Path, step: int, images: Iterator[SampleImage]) -> Path:
    """Write images and their index as ``root/step-000000100``, which appears complete or not at all."""
    remove_stale(root)
    target, temporary = root / step_dir(step), temporary_dir(root)
    try:
        write_images(temporary, images)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def write_images(folder: Path, images: Iterator[SampleImage]) -> None:
    """Write each image as PNG, and ``index.json``: a list of ``{"file", "prompt", "seed"}`` as drawn."""
    index: list[dict[str, object]] = []
    numbers: dict[str, int] = {}
    for sample in images:
        number = numbers.setdefault(sample.prompt, len(numbers))
        name = f"p{number:02d}-s{sample.seed}.png"
        sample.image.save(folder / name)
        index.append({"file": name, "prompt": sample.prompt, "seed": sample.seed})
    (folder / INDEX).write_text(json.dumps(index, indent=1, ensure_ascii=False))


def sample_images(spec: RunSpec, checkpoint_dir: Path | None, out: Path) -> Path:
    """Draw the samples of a spec into a new or empty folder, from a checkpoint or from the bare base.

    Raises:
        BadInput: The spec has no samples, or the folder is not empty.
        BadCheckpoint: The checkpoint is damaged or does not fit the spec.
    """
    if spec.samples is None:
        raise BadInput("the spec has no samples block", "name at least one prompt")
    if out.exists() and any(out.iterdir()):
        raise BadInput(f"{out} is not empty", "give a new folder")
    family = trained_on_base(spec.base, checkpoint_dir)[0] if checkpoint_dir else load_family(spec.base)
    out.mkdir(parents=True, exist_ok=True)
    write_images(out, draw_images(family, spec, LiveTexts(family), Stop()))
    return out


def trained_on_base(base: Base, checkpoint_dir: Path, name: str = "default") -> tuple[Family, Methods]:
    """Load a base and put what a verified checkpoint holds onto it, in use.

    Raises:
        BadCheckpoint: It is damaged, or of a run with another base or method.
        BadInput, BaseUnavailable: The base cannot be loaded.
    """
    family = load_family(base)
    read_progress(checkpoint_dir)
    methods = attach(base, family, name)
    if problem := restore(methods, read_adapter(checkpoint_dir)):
        raise BadCheckpoint(f"{checkpoint_dir / ADAPTER}: {problem}", "it belongs to another run")
    return family, methods


def _denoise(
    family: Family,
    samples: Samples,
    seeds: tuple[int, ...],
    shape: tuple[int, int],
    prompt: str,
    texts: Texts,
    stop: Stop,
) -> Tensor:
    guided = samples.cfg > 1
    count, device = len(seeds), family.device
    conditioning = texts.conditioning([samples.negative] * count * guided + [prompt] * count)
    pixels = [side * family.latent_pixels for side in shape]
    size_6 = torch.tensor([*pixels, 0, 0, *pixels], dtype=torch.float32, device=device)
    conditioning |= family.size_conditioning(size_6.expand(count * (1 + guided), 6))
    schedule = family.sampling_schedule()
    schedule.set_timesteps(samples.steps, device=device)
    noise = [
        torch.randn((family.latent_channels, *shape), generator=torch.Generator().manual_seed(seed))
        for seed in seeds
    ]
    latents_BCHW: Tensor = torch.stack(noise).to(device) * getattr(schedule, "init_noise_sigma", 1.0)
    scaled = getattr(schedule, "scale_model_input", lambda given, timestep: given)
    for timestep in schedule.timesteps:
        stop.check()
        model_input = scaled(torch.cat([latents_BCHW] * (1 + guided)), timestep)
        predicted = family.predict(model_input, timestep.expand(len(model_input)), conditioning)
        if guided:
            without, given = predicted.chunk(2)
            predicted = without + samples.cfg * (given - without)
        latents_BCHW = schedule.step(predicted, timestep, latents_BCHW).prev_sample
    return latents_BCHW


def _to_image(pixels_CHW: Tensor) -> Image.Image:
    levels_HWC = ((pixels_CHW / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0)
    return Image.fromarray(levels_HWC.numpy().astype(np.uint8))
