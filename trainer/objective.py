"""The DDPM objective: how a clean latent is noised and what the model is asked to predict.

With ``a = sqrt(alpha_bar_t)`` and ``s = sqrt(1 - alpha_bar_t)``: ``x_t = a x_0 + s e`` (Ho et al. 2020,
equation 4) and ``v = a e - s x_0`` (Salimans & Ho 2022). Pure functions; draws nothing.
"""

import torch
from torch import Tensor


def add_noise(x0_BCHW: Tensor, noise_BCHW: Tensor, alpha_bar_B: Tensor) -> Tensor:
    """Return ``x_t``, one noise level per sample."""
    a, s = _levels(alpha_bar_B)
    return a * x0_BCHW + s * noise_BCHW


def target(x0_BCHW: Tensor, noise_BCHW: Tensor, alpha_bar_B: Tensor, prediction_type: str) -> Tensor:
    """Return what the model should predict at ``x_t``.

    Raises:
        ValueError: ``prediction_type`` is neither ``epsilon`` nor ``v_prediction``.
    """
    match prediction_type:
        case "epsilon":
            return noise_BCHW
        case "v_prediction":
            a, s = _levels(alpha_bar_B)
            return a * noise_BCHW - s * x0_BCHW
        case _:
            raise ValueError(f"prediction_type must be epsilon or v_prediction, got {prediction_type!r}")


def loss(predicted_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
    """Return the mean squared error in fp32, as a scalar."""
    return torch.nn.functional.mse_loss(predicted_BCHW.float(), target_BCHW.float())


def _levels(alpha_bar_B: Tensor) -> tuple[Tensor, Tensor]:
    levels_B111 = alpha_bar_B.view(-1, 1, 1, 1)
    return levels_B111.sqrt(), (1 - levels_B111).sqrt()
