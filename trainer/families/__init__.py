"""What differs between families of base models, behind one small interface.

A family owns the frozen networks of one base model. The step loop, validation and sampling speak only to
``Family``; they do not know which one they have.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..config import Base


class Posterior(NamedTuple):
    """What the VAE says of one image: latents are ``mean + std * noise``, already scaled for the denoiser."""

    mean_CHW: Tensor
    std_CHW: Tensor


class Family(Protocol):
    """A loaded base model, frozen."""

    name: str
    device: torch.device
    prediction_type: str
    """``epsilon`` or ``v_prediction``."""
    latent_pixels: int
    """Pixels per latent, along each side."""
    alpha_bar_T: Tensor
    """Cumulative signal level by timestep, fp32, on ``device``."""
    denoiser: nn.Module
    """The network that receives the adapter."""

    def token_ids(self, text: str) -> list[int]:
        """The tokens that ``encode_tokens`` sees, truncated and padded."""

    def encode_tokens(self, token_ids: Sequence[int]) -> Tensor:
        """Return the text states (L, D) of one text, fp32, on the CPU."""

    def encode_image(self, pixels_CHW: Tensor) -> Posterior:
        """Return the latents of one image in [-1, 1], fp32, on the CPU."""

    def decode(self, latents_CHW: Tensor) -> Tensor:
        """Return the image (3, H, W) in [-1, 1] of scaled latents, fp32, on the CPU."""

    def predict(self, noisy_BCHW: Tensor, timesteps_B: Tensor, text_BLD: Tensor) -> Tensor:
        """Return the denoiser's prediction, fp32. Inputs are on ``device``."""

    def sampling_schedule(self) -> Any:
        """Return a fresh DPM-Solver multistep scheduler with this model's noise levels."""

    def text_identity(self) -> str:
        """Digest of the text encoder's weights."""

    def image_identity(self) -> str:
        """Digest of the image encoder's weights."""

    def rest_encoders(self) -> None:
        """Free what only caching needs: no text or image is encoded after this. ``decode`` still works."""


def load_family(base: Base, hub_cache: Path | None = None) -> Family:
    """Load and freeze a base model on the best device of this machine.

    Args:
        hub_cache: Where files from the hub are kept; by default where huggingface_hub keeps them.

    Raises:
        BadInput: There is no such model, it has no safetensors weights, it is of a family that is not
        supported,
            or the device cannot compute in the precision asked for.
        BaseUnavailable: The hub did not answer.
    """
    from .sd1 import StableDiffusion1  # families share this module

    return StableDiffusion1.load(base, hub_cache)
