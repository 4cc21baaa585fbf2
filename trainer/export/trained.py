"""A checkpoint's adapter as a program sees it that has it on its base: module by module, and what it does."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import RunSpec
from ..families import Family
from ..methods.configs import read_configs
from ..randomness import generator
from ..rundir import ADAPTER
from ..sample import adapted_family
from ..snapshot import read_progress
from ..tensor_file import read
from .modules import AdaptedModule, adapted_modules, networks

_TEXT = "a photo of a cat, seen from afar"
_LATENTS = 8
_TIMESTEP = 500


@dataclass(frozen=True, slots=True)
class Trained:
    """What is exported, and what every exported file must give back."""

    spec: RunSpec
    step: int
    family: str
    """``sd1``, ``sd2``, ``sdxl``, ``sd3``."""
    prediction_type: str | None
    """Of a base that is trained by diffusion: ``epsilon``, ``v_prediction`` or ``sample``."""
    configs: Mapping[str, Mapping[str, Any]]
    """By network, as ``methods.configs`` writes it into a checkpoint's header."""
    modules: tuple[AdaptedModule, ...]
    outputs: Mapping[str, Tensor]
    """See ``outputs_of``."""

    @property
    def kind(self) -> str:
        return self.spec.base.adapter


def trained_adapter(checkpoint_dir: Path, spec: RunSpec) -> Trained:
    """Load a verified checkpoint on its base, in fp32.

    Raises:
        BadCheckpoint: The checkpoint is damaged, or does not belong to this spec.
        BadInput, BaseUnavailable: The base cannot be loaded.
    """
    step = read_progress(checkpoint_dir).step
    plain = in_fp32(spec)
    family = adapted_family(plain, checkpoint_dir)
    _, metadata = read(checkpoint_dir / ADAPTER)
    return Trained(
        spec=spec,
        step=step,
        family=family.name,
        prediction_type=getattr(family.process, "prediction_type", None),
        configs=read_configs(metadata),
        modules=adapted_modules(networks(family), "default"),
        outputs=outputs_of(family),
    )


def in_fp32(spec: RunSpec) -> RunSpec:
    """Return the spec with a base that computes exactly, and as it is: neither compiled, rearranged nor
    quantised."""
    plain = {
        "mixed_precision": "no",
        "compile": False,
        "gradient_checkpointing": False,
        "channels_last": False,
        "quantize": "none",
    }
    return spec.model_copy(update={"base": spec.base.model_copy(update=plain)})


@torch.no_grad()
def outputs_of(family: Family) -> dict[str, Tensor]:
    """Return the prediction for one fixed noisy latent and text, and what the text encoders say of it."""
    for network in networks(family).values():
        network.eval()
    said = family.encode_tokens([family.token_ids(_TEXT)])
    pixels = float(_LATENTS * family.latent_pixels)
    sizes = family.size_conditioning(
        torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]], device=family.device)
    )
    shape = (1, family.latent_channels, _LATENTS, _LATENTS)
    noisy = torch.randn(shape, generator=generator(0, "verify latents", 0)).to(family.device)
    timesteps = torch.tensor([_TIMESTEP], device=family.device)
    predicted = family.predict(noisy, timesteps, {**said, **sizes})
    return {"prediction": predicted.cpu(), **{f"text {name}": tensor.cpu() for name, tensor in said.items()}}
