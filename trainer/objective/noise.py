"""The noise of one sample: plain Gaussian, unless a run asks for another.

Pure: everything is drawn from the generator of its own purpose, so that switching one on changes no other
number of the run.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..config import Base

Draws = Callable[[str], torch.Generator]
"""Returns the sample's fresh generator for a purpose."""


def sample_noise(base: Base, x0_CHW: Tensor, draws: Draws) -> Tensor:
    """Return the noise of a sample, shape (C, H, W): what is mixed into its latents, and to be predicted."""
    noise_CHW = torch.randn(x0_CHW.shape, generator=draws("noise"))
    if base.noise_offset or base.adaptive_noise_scale:
        noise_CHW = noise_CHW + _offset(base, x0_CHW, draws("noise offset"))
    if base.multires_noise_iterations:
        noise_CHW = _pyramid(base, noise_CHW, draws("noise pyramid"))
    return noise_CHW


def seen_noise(base: Base, noise_CHW: Tensor, draws: Draws) -> Tensor | None:
    """Return the noise in what the model sees, where that is another than it is to predict.

    Input perturbation: ``e + gamma e'`` (Ning et al. 2023, "Input perturbation reduces exposure bias in
    diffusion models", with gamma = 0.1), so that a model learns to correct its own errors.
    """
    if not base.input_perturbation:
        return None
    further_CHW = torch.randn(noise_CHW.shape, generator=draws("input perturbation"))
    return noise_CHW + base.input_perturbation * further_CHW


def _offset(base: Base, x0_CHW: Tensor, generator: torch.Generator) -> Tensor:
    """One number per channel, ``o randn(C)`` (Guttenberg 2023, "Diffusion with offset noise").

    Plain noise hardly touches the mean of an image even at the last timestep, so a model learns to keep it.
    ``o`` is ``noise_offset`` plus ``adaptive_noise_scale`` times the magnitude of the channel's mean
    (kohya's sd-scripts).
    """
    size_C11 = base.noise_offset + base.adaptive_noise_scale * x0_CHW.mean(dim=(1, 2), keepdim=True).abs()
    return size_C11 * torch.randn((x0_CHW.shape[0], 1, 1), generator=generator)


def _pyramid(base: Base, noise_CHW: Tensor, generator: torch.Generator) -> Tensor:
    """Add ever coarser layers, the i-th scaled by ``discount^i``; then make the sample's deviation 1.

    Whitaker 2023, "Multi-resolution noise for diffusion model training", in the form of kohya's sd-scripts:
    layer i is smaller by ``r^i`` with r uniform in [2, 4); layer 0 is of full size; one that is a single
    number wide or high is the last.
    """
    height, width = noise_CHW.shape[1:]
    for layer in range(base.multires_noise_iterations):
        ratio = float(torch.rand((), generator=generator)) * 2 + 2
        shape = max(1, int(height / ratio**layer)), max(1, int(width / ratio**layer))
        coarse = torch.randn((1, noise_CHW.shape[0], *shape), generator=generator)
        spread = nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")[0]
        noise_CHW = noise_CHW + base.multires_noise_discount**layer * spread
        if 1 in shape:
            break
    return noise_CHW / noise_CHW.std()
