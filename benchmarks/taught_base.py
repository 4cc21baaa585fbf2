"""Teaches the digits' base model to predict something else than noise: ``taught_base.py KIND FOLDER``.

``KIND`` is ``sample`` (the clean latent) or ``v_prediction``. The UNet is trained on, on the same scans,
captions and noise levels as in ``examples/digits/build.py``; the rest is copied. Seeded.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from harness import DIGITS
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from trainer.objective.process import Diffusion

sys.path.insert(0, str(DIGITS))
import build
import world

STEPS = 1000


def main(kind: str, target: Path) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    source = DIGITS / "base"
    vae = AutoencoderKL.from_pretrained(source / "vae").float()
    unet = UNet2DConditionModel.from_pretrained(source / "unet").float().train()
    scheduler = DDPMScheduler.from_pretrained(source / "scheduler")
    process = Diffusion(scheduler.alphas_cumprod, kind)
    scans = world.load()[0].only(*world.OLD_DIGITS)
    with torch.no_grad():
        mean, std = _moments(vae, scans)
        text_NLD, empty_LD = _states(source, scans.labels)

    def loss_of() -> Tensor:
        chosen = torch.randint(len(mean), (build.BATCH,), generator=generator)
        x0 = mean[chosen] + std[chosen] * torch.randn(mean[chosen].shape, generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        timesteps = torch.randint(process.levels, (build.BATCH,), generator=generator)
        dropped = torch.rand(build.BATCH, generator=generator) < build.CAPTION_DROPOUT
        text = torch.where(dropped[:, None, None], empty_LD, text_NLD[chosen])
        noisy = process.add_noise(x0, noise, timesteps)
        predicted = unet(noisy, timesteps, encoder_hidden_states=text).sample
        return torch.nn.functional.mse_loss(predicted, process.target(x0, noise, timesteps))

    loss = build.descend(kind, list(unet.parameters()), loss_of, STEPS, 1e-3)
    shutil.copytree(source, target)
    unet.half().save_pretrained(target / "unet")
    config = json.loads((target / "scheduler" / "scheduler_config.json").read_text())
    config["prediction_type"] = kind
    (target / "scheduler" / "scheduler_config.json").write_text(json.dumps(config, indent=2))
    print(f"{target}: loss {loss:.4f}")


def _moments(vae: AutoencoderKL, scans: world.Scans) -> tuple[Tensor, Tensor]:
    arrays = [np.asarray(world.to_image(scan), dtype=np.float32) for scan in scans.images]
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1.0
    posterior = vae.encode(pixels).latent_dist
    return posterior.mean * vae.config.scaling_factor, posterior.std * vae.config.scaling_factor


def _states(source: Path, labels: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> tuple[Tensor, Tensor]:
    """Return the text states of each scan's caption, (N, L, D), and of the empty caption, (L, D)."""
    tokenizer = CLIPTokenizer.from_pretrained(source / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(source / "text_encoder").float().eval()
    captions = [*(world.caption(digit) for digit in range(10)), ""]
    length = tokenizer.model_max_length
    ids_BL = tokenizer(captions, padding="max_length", max_length=length, return_tensors="pt").input_ids
    states_BLD = encoder(ids_BL).last_hidden_state
    return states_BLD[torch.from_numpy(labels)], states_BLD[-1]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
