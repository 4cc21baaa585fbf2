"""The validation loss: fixed images, timesteps and noise, so that only the adapter differs between runs.

The training loss is taken at random timesteps, whose losses differ by orders of magnitude: it cannot rank
runs.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .data import SPLIT_SEED, EncodedImage, controlled, crop, crop_corner, sizes
from .families import Conditioning, Family
from .randomness import generator
from .stop import Stop
from .texts import Texts

METRIC = "val/loss"
_CHUNK = 8
"""Noise levels of one image in one forward pass. Fixed: the split decides the last bits of the sum."""


def validation_loss(
    family: Family,
    images: Iterable[EncodedImage],
    texts: Texts,
    *,
    timesteps: int,
    stop: Stop,
) -> float:
    """Return the mean squared error over all images and timesteps, whatever the training loss weighs.

    An image is the mean of its posterior, cropped in the middle to the shape of its samples, with its own
    caption.

    Raises:
        Stopped: A stop was requested meanwhile.
    """
    levels = family.process.fixed_timesteps(timesteps)
    total, count = 0.0, 0
    with evaluating(family):
        for index, image in enumerate(images):
            view = image.views[0]
            corner = crop_corner(view.posterior.mean_CHW, image.shape, 0.5, 0.5)
            x0_CHW = crop(view.posterior.mean_CHW, image.shape, corner)
            size_6 = sizes(image, view, corner, image.shape, family.latent_pixels)
            conditioning = texts.conditioning([image.caption])
            conditioning |= family.size_conditioning(size_6[None].to(family.device))
            seen = controlled(view, image.shape, corner, family.latent_pixels)
            if seen is not None:
                conditioning |= family.control_conditioning(seen[None])
            for first in range(0, len(levels), _CHUNK):
                stop.check()
                chunk_B = levels[first : first + _CHUNK]
                noise_BCHW = torch.stack(
                    [_noise(index * len(levels) + first + k, x0_CHW) for k in range(len(chunk_B))]
                )
                total += _chunk_loss(family, x0_CHW, noise_BCHW, chunk_B, conditioning) * len(chunk_B)
                count += len(chunk_B)
    return total / count


@contextmanager
def evaluating(family: Family) -> Iterator[None]:
    """Turn off dropout and gradients."""
    networks = [family.denoiser, *family.text_encoders.values()]
    # Module by module: of a text encoder only the adapters train, and have dropout.
    training = [(module, module.training) for network in networks for module in network.modules()]
    for network in networks:
        network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, was in training:
            module.training = was


def expanded(conditioning: Conditioning, count: int) -> Conditioning:
    """Return the conditioning of one sample for ``count`` alike."""
    return {name: part.expand(count, *part.shape[1:]) for name, part in conditioning.items()}


def _noise(n: int, like_CHW: Tensor) -> Tensor:
    return torch.randn(like_CHW.shape, generator=generator(SPLIT_SEED, "validation noise", n))


def _chunk_loss(
    family: Family, x0_CHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor, conditioning: Conditioning
) -> float:
    count, device, process = len(timesteps_B), family.device, family.process
    timesteps_B = timesteps_B.to(device)
    x0_BCHW = x0_CHW.expand(count, *x0_CHW.shape).to(device)
    noise_BCHW = noise_BCHW.to(device)
    noisy_BCHW = process.add_noise(x0_BCHW, noise_BCHW, timesteps_B)
    predicted = family.predict(noisy_BCHW, timesteps_B, expanded(conditioning, count))
    return float(
        torch.nn.functional.mse_loss(predicted, process.target(x0_BCHW, noise_BCHW, timesteps_B).float())
    )
