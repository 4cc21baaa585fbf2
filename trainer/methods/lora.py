"""LoRA: ``y = W x + (alpha / r) B A x`` beside each targeted projection (Hu et al. 2021), through PEFT.

``B`` starts at zero, so a fresh adapter changes nothing; ``A`` is a function of the run's seed only.
"""

import json
import math
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from ..config import Base
from ..errors import BadInput
from ..families import Family
from ..randomness import generator

PREFIX = "unet."
"""Of parameter names in checkpoints and exports, as diffusers has it."""


def lora_config(base: Base) -> LoraConfig:
    return LoraConfig(
        r=base.rank,
        lora_alpha=base.lora_alpha,
        lora_dropout=base.lora_dropout,
        target_modules=list(base.targets),
        bias="none",
    )


class Lora:
    """See ``Method``."""

    def __init__(self, base: Base, parameters: dict[str, nn.Parameter]) -> None:
        self._base = base
        self.parameters = parameters

    @classmethod
    def attach(cls, base: Base, family: Family) -> "Lora":
        denoiser: Any = family.denoiser
        try:
            denoiser.add_adapter(lora_config(base))
        except ValueError as error:
            raise BadInput(
                f"base.targets {list(base.targets)} fit no module of {base.model}: {error}",
                "name endings of modules such as to_q, to_k, to_v, to_out.0",
            ) from error
        trainable = {
            PREFIX + name.replace(".default.", "."): parameter
            for name, parameter in denoiser.named_parameters()
            if parameter.requires_grad
        }
        parameters = {name: trainable[name] for name in sorted(trainable)}
        for n, (name, parameter) in enumerate(parameters.items()):
            parameter.data = _initial(name, parameter.shape, base.seed, n).to(family.device)
        return cls(base, parameters)

    def metadata(self) -> dict[str, str]:
        config = {
            "r": self._base.rank,
            "lora_alpha": self._base.lora_alpha,
            "target_modules": sorted(self._base.targets),
        }
        return {"format": "pt", "method": "lora", "config": json.dumps(config, sort_keys=True)}


def _initial(name: str, shape: torch.Size, seed: int, n: int) -> Tensor:
    """PEFT's own initial values, in fp32, but from our own randomness: B zero, A uniform by its fan-in."""
    if ".lora_B." in name:
        return torch.zeros(shape)
    return nn.init.kaiming_uniform_(
        torch.empty(shape), a=math.sqrt(5), generator=generator(seed, "adapter", n)
    )
