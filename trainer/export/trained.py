"""What a checkpoint holds as a program sees it that has it on its base: an adapter module by module, and what
each part of it does."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..config import RunSpec
from ..config.trained import Trained as TrainedKind
from ..families import Family
from ..methods.adapter import Adapter
from ..methods.configs import read_configs
from ..randomness import generator
from ..rundir import ADAPTER
from ..sample import trained_on_base
from ..snapshot import read_progress
from ..tensor_file import read
from .modules import AdaptedModule, adapted_modules, networks

_TEXT = "a photo of a cat, seen from afar"
_LATENTS = 8
_TIMESTEP = 500

M = TypeVar("M")


@dataclass(frozen=True, slots=True)
class Trained:
    """What is exported, and what every exported file must give back."""

    spec: RunSpec
    """Its ``base.train`` names only what this is."""
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
        """``lora``, ``loha``, ``lokr``, or what else was trained."""
        (what,) = self.spec.base.train
        return self.spec.base.adapter if what == "adapter" else what


def trained_adapter(checkpoint_dir: Path, spec: RunSpec) -> Trained:
    """Load a verified checkpoint on its base, in fp32.

    Raises:
        BadCheckpoint: The checkpoint is damaged, or does not belong to this spec.
        BadInput, BaseUnavailable: The base cannot be loaded.
    """
    with on_base(checkpoint_dir, spec, Adapter) as (family, _):
        _, metadata = read(checkpoint_dir / ADAPTER)
        return trained_part(
            *(spec, "adapter", checkpoint_dir, family),
            configs=read_configs(metadata),
            modules=adapted_modules(networks(family), "default"),
        )


@contextmanager
def on_base(checkpoint_dir: Path, spec: RunSpec, kind: type[M]) -> Iterator[tuple[Family, list[M]]]:
    """Load a verified checkpoint on its base, in fp32. Within, the family computes with the methods of one
    class, which are given beside it, and with nothing else that was trained.

    Raises:
        BadCheckpoint: The checkpoint is damaged, or does not belong to this spec.
        BadInput, BaseUnavailable: The base cannot be loaded.
    """
    family, methods = trained_on_base(in_fp32(spec).base, checkpoint_dir)
    with methods.only(kind):
        yield family, [member for member in methods.members if isinstance(member, kind)]


def trained_part(
    spec: RunSpec,
    what: TrainedKind,
    checkpoint_dir: Path,
    family: Family,
    *,
    configs: Mapping[str, Mapping[str, Any]] | None = None,
    modules: tuple[AdaptedModule, ...] = (),
) -> Trained:
    """Return one part of a checkpoint, whose family computes with this part and no other."""
    base = spec.base.model_copy(update={"train": (what,)})
    return Trained(
        spec=spec.model_copy(update={"base": base}),
        step=read_progress(checkpoint_dir).step,
        family=family.name,
        prediction_type=getattr(family.process, "prediction_type", None),
        configs=configs or {},
        modules=modules,
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
def outputs_of(family: Family, text: str = _TEXT) -> dict[str, Tensor]:
    """Return the prediction for one fixed noisy latent and a text, and what the text encoders say of it."""
    for network in networks(family).values():
        network.eval()
    said = family.encode_tokens([family.token_ids(text)])
    pixels = float(_LATENTS * family.latent_pixels)
    sizes = family.size_conditioning(
        torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]], device=family.device)
    )
    shape = (1, family.latent_channels, _LATENTS, _LATENTS)
    noisy = torch.randn(shape, generator=generator(0, "verify latents", 0)).to(family.device)
    timesteps = torch.tensor([_TIMESTEP], device=family.device)
    predicted = family.predict(noisy, timesteps, {**said, **sizes})
    return {"prediction": predicted.cpu(), **{f"text {name}": tensor.cpu() for name, tensor in said.items()}}
