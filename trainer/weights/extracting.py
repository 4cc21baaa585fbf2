"""The LoRA that comes nearest to the difference of two models of one architecture.

Linear layers and convolutions of the denoiser and of CLIP are compared, each by itself in fp32; those that
are equal are left out. What else differs (norms, biases, embeddings) no LoRA can hold: it is counted.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from ..config import Base
from ..errors import BadInput
from ..export.modules import AdaptedModule
from ..families.source import NETWORKS, load_pipeline
from .combining import Ranks
from .lora_file import LoraFile, family_of
from .low_rank import extract as nearest
from .low_rank import missed


@dataclass(frozen=True, slots=True)
class Extracted:
    """What was found, and what was not."""

    lora: LoraFile
    error: float
    """The largest relative error of a module's change, in the Frobenius norm."""
    left_out: tuple[str, ...]
    """Parameters that differ and that no LoRA can hold."""


def extract(base: str, tuned: str, ranks: Ranks, *, conv_rank: int | None = None) -> Extracted:
    """Return what a tuned model changes of its base, as a LoRA with alpha = rank.

    Args:
        base, tuned: Diffusers folders, single files, or hub ids.
        conv_rank: At most this rank for kernels larger than 1, in place of the other.

    Raises:
        BadInput: They have different architectures, are equal, or hold NaN. Names the first key.
        BaseUnavailable
    """
    if not ranks.is_given:
        problem = "of linear layers? --conv-rank is of kernels larger than 1" if conv_rank else "to extract?"
        raise BadInput(f"which rank {problem}", "give --rank, --threshold or --ratio")
    of_convolutions = replace(ranks, rank=conv_rank or ranks.rank)
    modules: list[AdaptedModule] = []
    left_out: list[str] = []
    worst = 0.0
    before, after = _networks(base), _networks(tuned)
    if before.keys() != after.keys():
        odd = min(before.keys() ^ after.keys())
        raise BadInput(
            f"only {base if odd in before else tuned} has a {odd}", "they are of different families"
        )
    for network, root in before.items():
        for name, delta in _changes(network, root, after[network], (base, tuned), left_out):
            own = of_convolutions if delta.ndim == 4 and delta.shape[-1] > 1 else ranks
            try:
                factors = nearest(delta, own.choice(), most=own.most)
            except ValueError as error:
                raise BadInput(f"{tuned}: {network}.{name}.weight {error}") from error
            worst = max(worst, missed(delta, factors))
            tensors = {"lora_A.weight": factors.down, "lora_B.weight": factors.up}
            modules.append(
                AdaptedModule(
                    network=network, name=name, rank=factors.rank, scale=factors.scale, tensors=tensors
                )
            )
    if not modules:
        raise BadInput(f"{base} and {tuned} have the same linear layers and convolutions")
    found = tuple(sorted(modules, key=lambda one: (one.network, one.name)))
    lora = LoraFile(
        path=Path(tuned),
        form="kohya",
        family="sdxl" if "text_encoder_2" in before and "unet" in before else family_of(found, {}, {}),
        modules=found,
        metadata={},
        dtype=torch.float32,
    )
    return Extracted(lora, worst, tuple(left_out))


def _networks(model: str) -> dict[str, nn.Module]:
    """Return the denoiser and the CLIP text encoders of a model; T5 is read by nobody's LoRA."""
    pipeline = load_pipeline(Base(model=model))
    found = {name: getattr(pipeline, name, None) for name in NETWORKS}
    clip = (CLIPTextModel, CLIPTextModelWithProjection)
    return {
        name: root
        for name, root in found.items()
        if root is not None and (not name.startswith("text") or isinstance(root, clip))
    }


def _changes(
    network: str, before: nn.Module, after: nn.Module, models: tuple[str, str], left_out: list[str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the changes of the weights that a LoRA can hold, and note the other parameters that differ."""
    old, new = _weights(before), _weights(after)
    if odd := sorted(old.keys() ^ new.keys()):
        raise BadInput(
            f"only {models[odd[0] in new]} has {network}.{odd[0]}", "they are of different families"
        )
    layers = {
        name
        for name, layer in before.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
        and (network in ("unet", "transformer") or "layers" in name)
    }
    for key in sorted(old):
        if old[key].shape != new[key].shape:
            shapes = f"{list(old[key].shape)} in {models[0]}, {list(new[key].shape)} in {models[1]}"
            raise BadInput(f"{network}.{key} has shape {shapes}", "they are of different families")
        module, _, part = key.rpartition(".")
        delta = new[key].float() - old[key].float()
        if not delta.any():
            continue
        if part == "weight" and module in layers:
            yield module, delta
        else:
            left_out.append(f"{network}.{key}")


def _weights(root: Any) -> Mapping[str, Tensor]:
    return {name: parameter.detach() for name, parameter in root.named_parameters()}
