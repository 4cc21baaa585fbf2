"""How a clean latent becomes noise, and what a model is asked to predict. Pure: draws nothing of its own.

Diffusion, with ``a = sqrt(alpha_bar_t)`` and ``s = sqrt(1 - alpha_bar_t)``: ``x_t = a x_0 + s e`` (Ho et al.
2020, equation 4) and ``v = a e - s x_0`` (Salimans & Ho 2022).
"""

from typing import Protocol

import torch
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction", "sample")
LEAST_SNR, MOST_SNR = 1e-6, 1e6
"""Bounds of the signal-to-noise ratio by which losses are weighed."""


class Process(Protocol):
    """One family's way from image to noise."""

    levels: int
    """Timesteps of the schedule."""

    def draw_timestep(self, generator: torch.Generator, first: int, end: int, sampling: str) -> Tensor:
        """Return a timestep as a scalar, drawn from [``first``, ``end``)."""

    def fixed_timesteps(self, count: int) -> Tensor:
        """Return ``count`` timesteps, each in the middle of its share of the schedule."""

    def add_noise(self, x0_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        """Return ``x_t``, one noise level per sample."""

    def target(self, x0_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        """Return what the model should predict at ``x_t``."""

    def snr(self, timesteps_B: Tensor) -> Tensor:
        """Return the signal-to-noise ratio ``alpha_bar / (1 - alpha_bar)``, shape (B,)."""

    def per_x0(self, timesteps_B: Tensor) -> Tensor:
        """Return by what the squared error of ``x_0`` is multiplied to be that of the prediction, (B,)."""


class Diffusion:
    """The process of DDPM, by the cumulative signal level of each timestep. See ``Process``."""

    def __init__(self, alpha_bar_T: Tensor, prediction_type: str) -> None:
        """``alpha_bar_T`` is fp32, on the device of the model.

        Raises:
            ValueError: No such prediction type.
        """
        if prediction_type not in PREDICTIONS:
            raise ValueError(f"prediction_type must be one of {PREDICTIONS}, got {prediction_type!r}")
        self.alpha_bar_T = alpha_bar_T
        self.prediction_type = prediction_type
        self.levels = len(alpha_bar_T)

    def draw_timestep(self, generator: torch.Generator, first: int, end: int, sampling: str) -> Tensor:
        """See ``Process``. ``logit_normal``: the sigmoid of a normal number, so the middle more often."""
        if sampling == "logit_normal":
            place = torch.randn((), generator=generator).sigmoid()
            return (first + (place * (end - first)).long()).clamp(max=end - 1)
        return torch.randint(first, end, (), generator=generator)

    def fixed_timesteps(self, count: int) -> Tensor:
        return torch.tensor([(2 * k + 1) * self.levels // (2 * count) for k in range(count)])

    def add_noise(self, x0_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        a_B111, s_B111 = self._levels(timesteps_B)
        return a_B111 * x0_BCHW + s_B111 * noise_BCHW

    def target(self, x0_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return noise_BCHW
        if self.prediction_type == "sample":
            return x0_BCHW
        a_B111, s_B111 = self._levels(timesteps_B)
        return a_B111 * noise_BCHW - s_B111 * x0_BCHW

    def snr(self, timesteps_B: Tensor) -> Tensor:
        """See ``Process``. Kept within bounds, so that no weight is 0/0: with zero-terminal SNR the last
        timestep holds no signal, and a schedule may begin without noise."""
        alpha_bar_B = self.alpha_bar_T[timesteps_B]
        return (alpha_bar_B / (1 - alpha_bar_B)).clamp(LEAST_SNR, MOST_SNR)

    def per_x0(self, timesteps_B: Tensor) -> Tensor:
        snr_B = self.snr(timesteps_B)
        return {"epsilon": snr_B, "v_prediction": snr_B + 1, "sample": torch.ones_like(snr_B)}[
            self.prediction_type
        ]

    def _levels(self, timesteps_B: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar_B111 = self.alpha_bar_T[timesteps_B].view(-1, 1, 1, 1)
        return alpha_bar_B111.sqrt(), (1 - alpha_bar_B111).sqrt()
