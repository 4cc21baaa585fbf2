"""Train the base model in ``base/`` on every digit but nine: ``python examples/digits/build.py``.

First the text encoder, which is to know all ten words, as CLIP knows words that a diffusion model cannot
draw: it learns to keep captions apart. Then the autoencoder; then the UNet, to predict the noise, with one
caption in ten left out so that classifier-free guidance works. These two see no nine.

Every random number comes from seeded generators: the same machine and the same libraries give the same
model. The last line of output is a JSON object of figures.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import model
import numpy as np
import score
import torch
import world
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModel

BATCH = 32
CAPTION_DROPOUT = 0.1
GUIDANCE = 3.0
SAMPLING_STEPS = 15


def descend(
    name: str, parameters: list[Tensor], loss_of: Callable[[], Tensor], steps: int, learning_rate: float
) -> float:
    """Minimise a loss with AdamW under a warm-up and a cosine; return the mean loss of the last tenth."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    tail: list[float] = []
    began = time.monotonic()
    for step in range(steps):
        rate = learning_rate * min(1.0, (step + 1) / 50) * 0.5 * (1.0 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step >= steps * 9 // 10:
            tail.append(loss.item())
        if (step + 1) % 50 == 0:
            pace = (time.monotonic() - began) / (step + 1)
            print(f"{name} {step + 1}/{steps}  loss {loss.item():.4f}  {pace:.3f} s/step", flush=True)
    return sum(tail) / len(tail)


def train_text(text_encoder: CLIPTextModel, ids_BL: Tensor, steps: int) -> float:
    """Teach the text encoder to give different captions orthogonal states, from the digit's word onwards.

    At random, the states of any two captions point almost the same way, and then a UNet that learns something
    about one learns it about all.

    Args:
        ids_BL: Token ids of the captions: those of all digits, and the empty one.
    """
    first = 3  # after the start, "a" and "handwritten", all captions are still the same
    same = torch.eye(len(ids_BL))

    def loss_of() -> Tensor:
        directions = F.normalize(text_encoder(ids_BL).last_hidden_state[:, first:], dim=-1)
        return F.mse_loss(
            torch.einsum("ild,jld->lij", directions, directions), same.expand(directions.shape[1], -1, -1)
        )

    return descend("text encoder", list(text_encoder.parameters()), loss_of, steps, 1e-3)


def train_vae(vae: AutoencoderKL, pixels: Tensor, steps: int, generator: torch.Generator) -> float:
    """Teach the autoencoder to rebuild images; then set its scaling factor for latents of unit variance."""

    def loss_of() -> Tensor:
        batch = pixels[torch.randint(len(pixels), (BATCH,), generator=generator)]
        posterior = vae.encode(batch).latent_dist
        rebuilt = vae.decode(posterior.sample(generator)).sample
        # a faint pull towards the unit normal keeps latents small and smooth without blurring the strokes
        return F.mse_loss(rebuilt, batch) + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()

    loss = descend("autoencoder", list(vae.parameters()), loss_of, steps, 2e-3)
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.sample(generator)
    vae.register_to_config(scaling_factor=round(1.0 / latents.std().item(), 5))
    return loss


def train_unet(
    unet: UNet2DConditionModel,
    moments: tuple[Tensor, Tensor],
    text_NLD: Tensor,
    empty_LD: Tensor,
    scheduler: DDPMScheduler,
    steps: int,
    generator: torch.Generator,
) -> float:
    """Teach the UNet to predict the noise.

    Args:
        moments: Mean and standard deviation of each image's latents, already scaled, each (N, 4, 8, 8).
        text_NLD: The text encoder's states for each image's caption.
        empty_LD: Those of the empty caption.
    """
    mean, std = moments

    def loss_of() -> Tensor:
        chosen = torch.randint(len(mean), (BATCH,), generator=generator)
        latents = mean[chosen] + std[chosen] * torch.randn(mean[chosen].shape, generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (BATCH,), generator=generator)
        dropped = torch.rand(BATCH, generator=generator) < CAPTION_DROPOUT
        text = torch.where(dropped[:, None, None], empty_LD, text_NLD[chosen])
        noisy = scheduler.add_noise(latents, noise, timesteps)
        return F.mse_loss(unet(noisy, timesteps, encoder_hidden_states=text).sample, noise)

    return descend("unet", list(unet.parameters()), loss_of, steps, 2e-3)


def sample(pipeline: StableDiffusionPipeline, digit: int, count: int) -> list[Image.Image]:
    """Draw images of one digit, as a sweep's samples are drawn."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    images: list[Image.Image] = pipeline(
        [world.caption(digit)] * count,
        height=world.RESOLUTION,
        width=world.RESOLUTION,
        num_inference_steps=SAMPLING_STEPS,
        guidance_scale=GUIDANCE,
        generator=generators,
    ).images
    return images


def picture(rows: list[list[Image.Image]]) -> Image.Image:
    """Return images side by side, one row per digit."""
    side = world.RESOLUTION
    sheet = Image.new("L", (side * len(rows[0]), side * len(rows)), 255)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image.convert("L"), (x * side, y * side))
    return sheet.quantize(16)


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=here / "base", help="model folder (replaced)")
    parser.add_argument("--picture", type=Path, default=here / "samples.png", help="samples, a row per digit")
    parser.add_argument("--vae-steps", type=int, default=600)
    parser.add_argument("--unet-steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    torch.use_deterministic_algorithms(True)
    generator = torch.Generator().manual_seed(arguments.seed)
    began = time.monotonic()

    scans = world.load()[0].only(*world.OLD_DIGITS)
    arrays = [np.asarray(world.to_image(scan), dtype=np.float32) for scan in scans.images]
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1.0
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = model.build_tokenizer(Path(folder))
    vae, unet, text_encoder = model.build_models(tokenizer)
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )

    captions = [*(world.caption(digit) for digit in range(10)), ""]
    ids_BL = tokenizer(
        captions, padding="max_length", max_length=model.TEXT_LENGTH, return_tensors="pt"
    ).input_ids
    text_loss = train_text(text_encoder, ids_BL, 300)
    with torch.no_grad():
        text_BLD = text_encoder(ids_BL).last_hidden_state

    vae_loss = train_vae(vae, pixels, arguments.vae_steps, generator)
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    scale = vae.config.scaling_factor
    moments = (posterior.mean * scale, posterior.std * scale)

    labels = torch.from_numpy(scans.labels)
    unet_loss = train_unet(
        unet, moments, text_BLD[labels], text_BLD[-1], scheduler, arguments.unet_steps, generator
    )
    minutes = (time.monotonic() - began) / 60

    pipeline = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    # Half precision on disk only: diffusers loads both as fp32. The text encoder stays as it is, for
    # transformers would load it in the precision of the file.
    unet.half()
    vae.half()
    shutil.rmtree(arguments.out, ignore_errors=True)
    pipeline.save_pretrained(arguments.out)

    # what is measured is what was saved
    pipeline = StableDiffusionPipeline.from_pretrained(arguments.out)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    judge = score.Judge()
    recognised = {}
    rows = []
    for digit in range(10):
        images = sample(pipeline, digit, 20)
        recognised[world.WORDS[digit]] = float(np.mean([judge.digit(image) == digit for image in images]))
        rows.append(images[:12])
    picture(rows).save(arguments.picture, optimize=True)

    size = sum(path.stat().st_size for path in arguments.out.rglob("*") if path.is_file())
    figures = {
        "minutes": round(minutes, 1),
        "threads": torch.get_num_threads(),
        "vae_parameters": vae.num_parameters(),
        "unet_parameters": unet.num_parameters(),
        "text_parameters": text_encoder.num_parameters(),
        "bytes": size,
        "text_loss": round(text_loss, 5),
        "vae_loss": round(vae_loss, 5),
        "unet_loss": round(unet_loss, 5),
        "recognised": recognised,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
