"""A ControlNet in miniature, and what it sees of each image."""

import shutil
from pathlib import Path
from typing import Any


def build_control(base: Path, folder: Path, *, size: float = 0.3) -> Path:
    """Write a ControlNet of a base, whose zero convolutions have random numbers of such a size."""
    import torch
    from diffusers import ControlNetModel

    from trainer.config import Base
    from trainer.families import load_family

    unet: Any = load_family(Base(model=str(base))).denoiser
    network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 8, 8))
    numbers = torch.Generator().manual_seed(2)
    ends = (network.controlnet_down_blocks, network.controlnet_mid_block)
    for parameter in (*ends[0].parameters(), *ends[1].parameters()):
        parameter.data = size * torch.randn(parameter.shape, generator=numbers)
    torch.nn.init.normal_(network.controlnet_cond_embedding.conv_out.weight, std=0.3, generator=numbers)
    network.save_pretrained(folder)
    return folder


def add_conditions(images: Path) -> Path:
    """Put a condition image beside each image: the image itself, so that what is seen can be compared."""
    for path in sorted(images.glob("*.png")):
        shutil.copy(path, path.with_suffix(".control.png"))
    return images
