"""What one pass of training keeps and needs: the very loss of a step, of a batch without numbers."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batch import Batch
from ..beside import NOTHING, Beside, ControlImages
from ..config import RunSpec
from ..families import Conditioning
from ..methods import Methods
from ..objective import Objective
from ..step import summed_loss
from ..texts import CachedTexts, LiveTexts, Texts, is_cached
from .live_bytes import LiveBytes
from .numberless import all_tensors


class Pass(NamedTuple):
    """Bytes of one forward and backward pass."""

    kept: int
    """For the way back."""
    work: int
    """On top of these, at the highest moment of both ways."""


class _Hidden:
    """See ``Beside``: what a hollowed denoiser is told, as if it came from the cache."""

    def __init__(self, states: Conditioning) -> None:
        self._states = states

    def conditioning(self, batch: Batch) -> Conditioning:
        return {name: part.clone() for name, part in self._states.items()}


def training_pass(spec: RunSpec, family: Any, methods: Methods, images: int, step: int) -> Pass:
    """Return what one pass of optimizer step ``step`` needs, gradients not counted.

    Args:
        family: Of fake tensors, as ``numberless.fake`` leaves it, and ``in_training``.
        images: Of the pass.
    """
    trained = methods.at(step)
    methods.use()
    for parameter in methods.parameters.values():
        parameter.grad = None
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    batch = _batch(spec, family, images)
    texts, beside = _texts(spec, family), _beside(spec, family, batch)
    known = [*all_tensors(family), *methods.parameters.values(), *_tensors_of(batch)]
    with LiveBytes([*known, *(p.grad for p in trained if p.grad is not None)]) as live:
        loss = summed_loss(
            batch,
            family=family,
            methods=methods,
            objective=Objective(spec.base, family.process),
            texts=texts,
            beside=beside,
        )
        kept = live.now
        loss.backward()  # type: ignore[no-untyped-call]
    return Pass(kept, live.most - kept)


def _batch(spec: RunSpec, family: Any, images: int) -> Batch:
    base, side = spec.base, spec.base.resolution // family.latent_pixels
    latents_BCHW = torch.zeros(images, family.latent_channels, side, side)
    control_B3HW = torch.zeros(images, 3, base.resolution, base.resolution, dtype=torch.uint8)
    return Batch(
        samples=tuple(range(images)),
        x0_BCHW=latents_BCHW,
        noise_BCHW=latents_BCHW.clone(),
        timesteps_B=family.process.fixed_timesteps(1).repeat(images),
        captions=("",) * images,  # any caption is padded to the same length
        sizes_B6=torch.zeros(images, 6),
        weights_B=torch.ones(images),
        mask_B1HW=None if spec.dataset.masks == "none" else torch.ones(images, 1, side, side),
        seen_noise_BCHW=latents_BCHW.clone() if base.input_perturbation else None,
        control_B3HW=control_B3HW if base.control else None,
        from_base=False,
    )


def _tensors_of(batch: Batch) -> list[Tensor]:
    """They are on the CPU; what of them is on the GPU is a copy."""
    parts = (getattr(batch, name) for name in batch.__slots__)
    return [part for part in parts if isinstance(part, Tensor)]


def _texts(spec: RunSpec, family: Any) -> Texts:
    if not is_cached(spec):
        return LiveTexts(family)
    with torch.no_grad():
        told: Conditioning = family.encode_tokens([family.token_ids("")])
    return CachedTexts({"": {name: part[0] for name, part in told.items()}}, family.device)


def _beside(spec: RunSpec, family: Any, batch: Batch) -> Beside:
    if spec.base.control:
        return ControlImages(family)
    if not family.cut:
        return NOTHING
    with torch.no_grad():
        told = _texts(spec, family).conditioning(batch.captions) | family.size_conditioning(batch.sizes_B6)
        return _Hidden(family.hidden(batch.x0_BCHW, batch.timesteps_B, told))
