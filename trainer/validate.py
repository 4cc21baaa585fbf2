"""The validation loss: fixed images, timesteps and noise, so that only the adapter differs between runs.

The training loss is taken at random timesteps, whose losses differ by orders of magnitude: it cannot rank
runs.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from .data import SPLIT_SEED, EncodedImage, crop
from .families import Family
from .objective import add_noise, loss, target
from .randomness import generator
from .stop import Stop

METRIC = "val/loss"
_CHUNK = 8
"""Noise levels of one image in one forward pass. Fixed: the split decides the last bits of the sum."""


def validation_timesteps(count: int, total: int) -> list[int]:
    """Return ``count`` timesteps, each in the middle of its share of the ``total``."""
    return [(2 * k + 1) * total // (2 * count) for k in range(count)]


def validation_loss(
    family: Family,
    images: Iterable[EncodedImage],
    text: Mapping[str, Tensor],
    *,
    resolution: int,
    timesteps: int,
    stop: Stop,
) -> float:
    """Return the mean squared error over all images and timesteps.

    An image is the mean of its posterior, cropped in the middle, with its own caption.

    Raises:
        Stopped: A stop was requested meanwhile.
    """
    levels = validation_timesteps(timesteps, len(family.alpha_bar_T))
    total, count = 0.0, 0
    with evaluating(family):
        for index, image in enumerate(images):
            x0_CHW = crop(image.views[0].mean_CHW, resolution // family.latent_pixels, 0.5, 0.5)
            for first in range(0, len(levels), _CHUNK):
                stop.check()
                chunk = levels[first : first + _CHUNK]
                noise_BCHW = torch.stack(
                    [_noise(index * len(levels) + first + k, x0_CHW) for k in range(len(chunk))]
                )
                total += _chunk_loss(family, x0_CHW, noise_BCHW, chunk, text[image.caption]) * len(chunk)
                count += len(chunk)
    return total / count


@contextmanager
def evaluating(family: Family) -> Iterator[None]:
    """Turn off dropout and gradients."""
    training = family.denoiser.training
    family.denoiser.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        family.denoiser.train(training)


def _noise(n: int, like_CHW: Tensor) -> Tensor:
    return torch.randn(like_CHW.shape, generator=generator(SPLIT_SEED, "validation noise", n))


def _chunk_loss(
    family: Family, x0_CHW: Tensor, noise_BCHW: Tensor, levels: list[int], text_LD: Tensor
) -> float:
    count, device = len(levels), family.device
    timesteps_B = torch.tensor(levels, device=device)
    alpha_bar_B = family.alpha_bar_T[timesteps_B]
    x0_BCHW = x0_CHW.expand(count, *x0_CHW.shape).to(device)
    noise_BCHW = noise_BCHW.to(device)
    text_BLD = text_LD.expand(count, *text_LD.shape).to(device)
    predicted = family.predict(add_noise(x0_BCHW, noise_BCHW, alpha_bar_B), timesteps_B, text_BLD)
    return float(loss(predicted, target(x0_BCHW, noise_BCHW, alpha_bar_B, family.prediction_type)))
