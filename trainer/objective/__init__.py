"""What a prediction costs. Pure functions of what they are given; nothing is drawn here."""

import math

import torch
from torch import Tensor

from ..config import Base
from ..errors import BadInput
from .process import Process

DEBIASED_SNR = 1000.0
"""``debiased`` treats less noise than this alike: its weight would follow the first timestep's rounding."""


class Objective:
    """The training loss of one run, by its ``loss`` and ``loss_weighting``."""

    def __init__(self, base: Base, process: Process) -> None:
        """
        Raises:
            BadInput: The base model's process does not go with the run's keys.
        """
        _check(base, process)
        self._base = base
        self._process = process

    def losses(
        self, predicted_BCHW: Tensor, target_BCHW: Tensor, timesteps_B: Tensor, mask_B1HW: Tensor | None
    ) -> Tensor:
        """Return the weighted loss of each sample in fp32, shape (B,).

        The mean over all latents, those that a mask leaves out too: an image of which little counts, counts
        little (as in kohya's sd-scripts and OneTrainer's default).

        Args:
            mask_B1HW: What each latent counts, in [0, 1]; None: all count 1.
        """
        error_BCHW = self._error(predicted_BCHW.float() - target_BCHW.float(), timesteps_B)
        if mask_B1HW is not None:
            error_BCHW = error_BCHW * mask_B1HW
        losses_B = error_BCHW.flatten(1).mean(1)
        return losses_B if self._base.loss_weighting == "uniform" else losses_B * self.weights(timesteps_B)

    def weights(self, timesteps_B: Tensor) -> Tensor:
        """Return by what ``loss_weighting`` multiplies the loss of what the model predicts, shape (B,).

        All but ``uniform`` are defined by one weight ``w(SNR)`` of the squared error of ``x_0``, and so mean
        the same for each prediction type: an error of ``x_0`` becomes one of the prediction times SNR
        (epsilon), SNR + 1 (v), 1 (sample) or (sqrt(SNR) + 1)^2 (flow), by which ``w`` is divided.

        ============ ============================ ==========================================
        min_snr      min(SNR, gamma)              Hang et al. 2023
        soft_min_snr SNR gamma / (SNR + gamma)    Crowson et al. 2024 (HDiT)
        debiased     SNR / sqrt(min(SNR, 1000))   Yu et al. 2024: 1/sqrt(SNR) for epsilon
        p2           SNR / (k + SNR)^gamma        Choi et al. 2022: 1/(k + SNR)^gamma for epsilon
        ============ ============================ ==========================================

        SNR is bounded, see ``process.Diffusion.snr``, so all are finite. For v-prediction others differ:
        ``debiased`` is 1/(SNR + 1) in kohya's sd-scripts and 1/sqrt(SNR + 1) in OneTrainer, here
        sqrt(SNR)/(SNR + 1); ``min_snr`` is min(SNR, gamma)/SNR + 1 in diffusers' DreamBooth scripts, so that
        a timestep without any signal counts at all: that is what ``loss_weight_floor`` is for.
        """
        base = self._base
        per_x0_B = self._process.per_x0(timesteps_B)
        snr_B = self._process.snr(timesteps_B)
        match base.loss_weighting:
            case "uniform":
                x0_weights_B = per_x0_B
            case "min_snr":
                x0_weights_B = snr_B.clamp(max=base.snr_gamma)
            case "soft_min_snr":
                x0_weights_B = snr_B * base.snr_gamma / (snr_B + base.snr_gamma)
            case "debiased":
                x0_weights_B = snr_B / snr_B.clamp(max=DEBIASED_SNR).sqrt()
            case "p2":
                x0_weights_B = snr_B / (base.p2_k + snr_B) ** base.p2_gamma
        return (x0_weights_B / per_x0_B).clamp(min=base.loss_weight_floor)

    def _error(self, difference_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        """The squared error, or pseudo-Huber (Charbonnier et al. 1997; for diffusion Khrapov et al. 2024).

        ``huber``: ``2 c (sqrt(d^2 + c^2) - c)``, which is ``d^2`` for a large ``c``; ``smooth_l1``:
        ``2 (sqrt(d^2 + c^2) - c)``, which is ``2 |d|`` for a small one; both as in kohya's sd-scripts, but
        written without the difference of two nearly equal numbers.
        """
        square_BCHW = difference_BCHW.square()
        if self._base.loss == "l2":
            return square_BCHW
        c_B111 = self.huber_c(timesteps_B).view(-1, 1, 1, 1)
        smooth_l1_BCHW = 2 * square_BCHW / ((square_BCHW + c_B111.square()).sqrt() + c_B111)
        return smooth_l1_BCHW if self._base.loss == "smooth_l1" else c_B111 * smooth_l1_BCHW

    def huber_c(self, timesteps_B: Tensor) -> Tensor:
        """Return ``c`` at each timestep, shape (B,), fp32.

        ``constant``; ``exponential``, ``c^(t/T)``, from 1 without noise to ``c``; ``snr``,
        ``(1 - c) / (1 + s)^2 + c`` with ``s = 1/sqrt(SNR)``, likewise: outliers count less where noise hides
        what is one (kohya's sd-scripts).
        """
        c = self._base.huber_c
        match self._base.huber_schedule:
            case "constant":
                return torch.full_like(timesteps_B, c, dtype=torch.float32)
            case "exponential":
                return (timesteps_B * (math.log(c) / self._process.levels)).exp()
            case "snr":
                return (1 - c) / (1 + self._process.snr(timesteps_B).rsqrt()) ** 2 + c


def _check(base: Base, process: Process) -> None:
    """Refuse what only the base model's process can tell. The rest is ``config.consistency``'s."""
    for name, timestep in (("min_timestep", base.min_timestep + 1), ("max_timestep", base.max_timestep or 1)):
        if timestep > process.levels:
            raise BadInput(
                f"base.{name} {getattr(base, name)} is beyond the {process.levels} timesteps of {base.model}",
                f"timesteps are 0 to {process.levels - 1}",
            )
