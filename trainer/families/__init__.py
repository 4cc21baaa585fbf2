"""What differs between families of base models, behind one small interface.

A family owns the frozen networks of one base model, and nothing of a run: several runs may share it. The step
loop, validation and sampling speak only to ``Family``; they do not know which one they have.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..config import Base
from ..config.control import Control
from ..config.families import FAMILIES
from ..objective.process import Process

if TYPE_CHECKING:
    from .hollow import Cut
    from .new_words import NewWords

Conditioning = dict[str, Tensor]
"""What the denoiser is told beside image and noise level, by the family's own names. Batched along the first
axis, unless said otherwise."""


class Posterior(NamedTuple):
    """What the VAE says of one image: latents are ``mean + std * noise``, already scaled for the denoiser."""

    mean_CHW: Tensor
    std_CHW: Tensor


class Family(Protocol):
    """A loaded base model, frozen."""

    name: str
    """``sd1``, ``sd2``, ``sdxl``, ``sd3``."""
    device: torch.device
    latent_pixels: int
    """Pixels per latent, along each side."""
    side_multiple: int
    """The sides of images are multiples of so many pixels."""
    latent_channels: int
    denoiser: nn.Module
    """The network that receives the adapter."""
    denoiser_prefix: str
    """Of its parameters in checkpoints and diffusers files: ``unet`` or ``transformer``."""
    text_encoders: Mapping[str, nn.Module]
    """By diffusers' names, ``text_encoder``, ``text_encoder_2``…; empty once they were freed."""
    takes_words: ClassVar[bool]
    """Whether other programs load new words of its texts from files."""
    targets: Mapping[str, tuple[str, ...]]
    """Endings of the denoiser's module names by ``TargetSet``; ``conv``: its convolutions."""
    cut: "Cut | None"
    """What the denoiser does without wherever ``predict`` is told what comes instead; see ``hidden``."""

    tokenizers: Sequence[Any]
    """One for each text encoder, in the order of their names."""
    words: "NewWords | None"
    """Words of a run's own that texts are read with, from when that run uses what it trains until another
    does."""

    @property
    def process(self) -> Process:
        """How images become noise, and what the denoiser predicts."""

    def token_ids(self, text: str) -> list[list[int]]:
        """The tokens that each text encoder sees, truncated and padded."""

    def encode_tokens(self, token_ids: Sequence[list[list[int]]]) -> Conditioning:
        """Return what several texts say, fp32, on ``device``; differentiable if a text encoder is trained."""

    def size_conditioning(self, sizes_B6: Tensor) -> Conditioning:
        """Return what the denoiser is told of sizes: (original height, width, crop top, left, target height,
        width) in pixels. Empty for families that are told nothing."""

    def encode_image(self, pixels_CHW: Tensor) -> Posterior:
        """Return the latents of one image in [-1, 1], fp32, on the CPU."""

    def decode(self, latents_CHW: Tensor) -> Tensor:
        """Return the image (3, H, W) in [-1, 1] of scaled latents, fp32, on the CPU."""

    def predict(self, noisy_BCHW: Tensor, timesteps_B: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the denoiser's prediction, fp32. Inputs are on ``device``."""

    def hidden(self, noisy_BCHW: Tensor, timesteps_B: Tensor, conditioning: Conditioning) -> Conditioning:
        """Return what ``predict`` is to be told besides so that it does without what ``cut`` removes; of a
        family that has one."""

    def inject(self, control: Control, hub_cache: Path | None = None) -> None:
        """Load a ControlNet, whose residuals go into each prediction that is told what it sees.

        Raises:
            BadInput: There is no such ControlNet, or it is not one of this model.
            BaseUnavailable: The hub did not answer.
        """

    def control_conditioning(self, pixels_B3HW: Tensor) -> Conditioning:
        """Return what ``predict`` is to be told of what a ControlNet sees, bytes on the CPU."""

    def sampling_schedule(self) -> Any:
        """Return a fresh diffusers scheduler with this model's noise levels."""

    def text_identity(self) -> str:
        """Digest of all that decides what ``encode_tokens`` gives."""

    def image_identity(self) -> str:
        """Digest of the image encoder's weights and scaling."""

    def ready(self) -> None:
        """Bring what is trained or trained beside to ``device``: the denoiser and all text encoders left."""

    def rest_text_encoders(self) -> None:
        """Let the text encoders leave the device until they are used again."""

    def rest_vae(self) -> None:
        """Let the VAE leave the device until it is used again."""

    def free_text_encoders(self) -> None:
        """Forget the text encoders: no text is encoded after this."""


def load_family(base: Base, hub_cache: Path | None = None) -> Family:
    """Load and freeze a base model. A network comes to the best device of this machine when it is used.

    Args:
        hub_cache: Where files from the hub are kept; by default where huggingface_hub keeps them.

    Raises:
        BadInput: There is no such model, it has no safetensors weights, it is of a family that is not
            supported, or the device cannot compute in the precision asked for.
        BaseUnavailable: The hub did not answer.
    """
    from .source import load_pipeline  # families share this module

    return family_of(load_pipeline(base, hub_cache), base)


def family_of(pipeline: Any, base: Base) -> Family:
    """Freeze a loaded diffusers pipeline, with whatever adapters are on it, for the best device.

    Raises:
        BadInput: As ``load_family``.
    """
    from .latent import check_finite, check_precision  # families share this module

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_precision(base, device)
    check_finite(base, pipeline)
    found = (family_class(name) for name in FAMILIES[type(pipeline).__name__])
    family: Family = next(kind for kind in found if kind.fits(pipeline))(pipeline, base, device)
    return family


def family_class(name: str) -> Any:
    """Return the class of a family by its name in ``config.families``."""
    return import_module(f".{name}", __name__).FAMILY
