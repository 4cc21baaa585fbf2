"""What an adapter is, module by module, as the layers of a network hold it: the same for what was trained and
for what a reader made of a file.

What a module adds to its weight, a convolution unfolded to two axes, with s its scale: LoRA s·B·A (Hu et al.
2021), LoHa s·(W1a·W1b)⊙(W2a·W2b) (Hyeon-Woo et al. 2022), LoKr s·W1⊗W2 (Yeh et al. 2024).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..families import Family
from ..methods.layers import MAGNITUDE

Kind = Literal["lora", "loha", "lokr"]


@dataclass(frozen=True, slots=True)
class AdaptedModule:
    """The adapter of one module."""

    network: str
    """``unet``, ``transformer``, ``text_encoder``, ``text_encoder_2``…"""
    name: str
    """Of the module within its network."""
    rank: int
    scale: float
    """What the product is multiplied by: alpha over the rank, or over its root."""
    tensors: Mapping[str, Tensor]
    """By the names of ``methods.layers``: ``lora_A.weight``, ``hada_w1_a``, ``lora_magnitude_vector``."""

    @property
    def kind(self) -> Kind:
        if any(part.startswith("hada_") for part in self.tensors):
            return "loha"
        return "lokr" if any(part.startswith("lokr_") for part in self.tensors) else "lora"

    @property
    def magnitude(self) -> Tensor | None:
        """DoRA's, one number per output."""
        return self.tensors.get(MAGNITUDE)

    @property
    def is_convolution(self) -> bool:
        """Whether its kernel is larger than 1×1: those have a rank of their own."""
        return any(tensor.ndim == 4 and tensor.shape[-1] > 1 for tensor in self.tensors.values())

    def change_OI(self) -> Tensor:
        """Return what is added to the weight, fp32; of DoRA, before the magnitude."""
        t = {part: tensor.float() for part, tensor in self.tensors.items()}
        if self.kind == "loha":
            product = (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
        elif self.kind == "lokr":
            w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
            w2 = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"].flatten(1)
            product = _kron(w1, w2)
        else:
            product = t["lora_B.weight"].flatten(1) @ t["lora_A.weight"].flatten(1)
        return self.scale * product.flatten(1)


def networks(family: Family) -> dict[str, nn.Module]:
    """Return the networks of a family that can be adapted, by the prefix of their names in files."""
    return {family.denoiser_prefix: family.denoiser, **family.text_encoders}


def adapted_modules(of: Mapping[str, nn.Module], adapter: str) -> tuple[AdaptedModule, ...]:
    """Return what an adapter consists of, in the order of names. Tensors are detached, on the CPU."""
    found = []
    for network, module in of.items():
        for name, layer in module.named_modules():
            if isinstance(layer, BaseTunerLayer) and adapter in getattr(layer, "scaling", {}):
                found.append(_adapted(network, name, layer, adapter))
    return tuple(sorted(found, key=lambda one: (one.network, one.name)))


def _adapted(network: str, name: str, layer: Any, adapter: str) -> AdaptedModule:
    tensors = {}
    for parameter_name, parameter in layer.named_parameters():
        part, _, rest = parameter_name.partition(f".{adapter}")
        if part in layer.adapter_layer_names and rest in ("", ".weight"):
            tensors[part if part == MAGNITUDE else part + rest] = parameter.detach().cpu()
    rank, scale = int(layer.r[adapter]), float(layer.scaling[adapter])
    return AdaptedModule(network=network, name=name, rank=rank, scale=scale, tensors=tensors)


def _kron(w1: Tensor, w2: Tensor) -> Tensor:
    """The Kronecker product over outputs and inputs, whatever kernel follows."""
    kernel = w2.shape[2:]
    return torch.kron(w1.reshape(*w1.shape, *(1 for _ in kernel)), w2)
