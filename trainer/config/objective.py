"""The objective: how images are noised, what a prediction costs, and how noise levels are weighted."""

from typing import Annotated, Literal

from pydantic import Field

from .values import Fraction, Frozen, NotNegative, Positive


class ObjectiveKeys(Frozen):
    loss: Literal["l2", "huber", "smooth_l1"] = "l2"
    """Squared error, or pseudo-Huber and its scaled form, which count outliers less."""
    huber_c: Positive = 0.1
    """Where pseudo-Huber turns from squared to absolute."""
    huber_schedule: Literal["constant", "exponential", "snr"] = "snr"
    """How ``huber_c`` depends on the timestep."""
    loss_weighting: Literal["uniform", "min_snr", "soft_min_snr", "debiased", "p2"] = "uniform"
    """Weight of a noise level; ``uniform`` is the plain loss of what the model predicts."""
    snr_gamma: Positive = 5.0
    """Of ``min_snr`` (Hang et al. 2023) and ``soft_min_snr`` (Crowson et al. 2024)."""
    loss_weight_floor: Fraction = 0.0
    """No noise level weighs less than this: at zero-terminal SNR the last one else counts nothing."""
    p2_k: Positive = 1.0
    p2_gamma: Positive = 1.0
    """Of ``p2`` (Choi et al. 2022)."""
    noise_offset: Fraction = 0.0
    """Share of noise that is one number per channel: lets a model learn very dark and bright images."""
    adaptive_noise_scale: NotNegative = 0.0
    """Added to ``noise_offset``, times the magnitude of the channel's mean."""
    multires_noise_iterations: Annotated[int, Field(ge=0, le=16)] = 0
    """Pyramid noise: so many layers of noise are added, each coarser than the one before."""
    multires_noise_discount: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Each layer is so many times as strong as the one before."""
    input_perturbation: Fraction = 0.0
    """Share of further noise in what the model sees, but not in what it should predict (Ning et al. 2023)."""
    min_timestep: Annotated[int, Field(ge=0)] = 0
    """Timesteps are drawn from here…"""
    max_timestep: Annotated[int, Field(ge=1)] | None = None
    """… up to below here; by default all."""
    timestep_sampling: Literal["auto", "uniform", "logit_normal"] = "auto"
    """How noise levels are drawn; ``auto``: uniform for diffusion, logit-normal for flow matching."""
