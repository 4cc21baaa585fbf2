"""Rectified flow: images and noise lie on straight lines, and a model predicts their direction.

``x_t = (1 - s) x_0 + s e`` with target ``e - x_0`` and ``t = levels * s`` (Liu et al. 2022; Esser et al.
2024, section 2). ``s`` is the share of noise, in [0, 1]; the timestep is that share in the model's units.
"""

import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor

from .process import LEAST_SNR, MOST_SNR


class FlowMatching:
    """See ``Process``. Timesteps are fp32 numbers, not indices."""

    prediction_type = "flow"

    def __init__(self, levels: int, shift: float) -> None:
        """``shift`` moves drawn noise levels towards noise, ``s' = shift s / (1 + (shift - 1) s)`` (Esser et
        al. 2024, equation 23), as the model's own schedule does when it samples."""
        self.levels = levels
        self.shift = shift

    def draw_timestep(self, generator: torch.Generator, first: int, end: int, sampling: str) -> Tensor:
        """See ``Process``. ``logit_normal`` and ``auto``: the sigmoid of a normal number, then shifted."""
        scheme = "uniform" if sampling == "uniform" else "logit_normal"
        (place,) = compute_density_for_timestep_sampling(scheme, 1, 0.0, 1.0, generator=generator)
        low, high = (self._before_shift(bound / self.levels) for bound in (first, end))
        drawn = self.levels * self._shifted(low + float(place) * (high - low))
        return torch.tensor(min(max(drawn, float(first)), float(end)))

    def fixed_timesteps(self, count: int) -> Tensor:
        return torch.tensor([(2 * k + 1) * self.levels / (2 * count) for k in range(count)])

    def add_noise(self, x0_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        share_B111 = self._share(timesteps_B).view(-1, 1, 1, 1)
        return (1 - share_B111) * x0_BCHW + share_B111 * noise_BCHW

    def target(self, x0_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        return noise_BCHW - x0_BCHW

    def snr(self, timesteps_B: Tensor) -> Tensor:
        """Return ``((1 - s) / s)^2``, within the bounds of every process."""
        share_B = self._share(timesteps_B)
        return ((1 - share_B) / share_B).square().clamp(LEAST_SNR, MOST_SNR)

    def per_x0(self, timesteps_B: Tensor) -> Tensor:
        """As ``x_0 = x_t - s (e - x_0)``, an error of the prediction is ``1 / s`` times that of ``x_0``."""
        return (self.snr(timesteps_B).sqrt() + 1).square()

    def _share(self, timesteps_B: Tensor) -> Tensor:
        return timesteps_B.float() / self.levels

    def _shifted(self, share: float) -> float:
        return self.shift * share / (1 + (self.shift - 1) * share)

    def _before_shift(self, share: float) -> float:
        return share / (self.shift - (self.shift - 1) * share)
