"""The values that an adapter begins with: no change at all, and otherwise a function of the seed only.

PEFT's own rules, from our own randomness: of each product of matrices one factor is zero, the others are
uniform by their fan-in (He et al. 2015, with ``a = sqrt(5)``). DoRA's magnitudes are the base's.
"""

import math

import torch
from torch import Tensor, nn

from ..randomness import generator
from .layers import MAGNITUDE

ZERO = ("lora_B", "hada_w2_b", "lokr_w2", "lokr_w2_b")
"""One factor of each kind. LoKr has ``w2`` whole, or as the product of ``w2_a`` and ``w2_b``."""


def initialise(parameters: dict[str, nn.Parameter], seed: int, purpose: str) -> None:
    """Fill an adapter's parameters in place, DoRA's magnitudes excepted."""
    for n, name in enumerate(sorted(parameters)):
        parameter = parameters[name]
        if not name.endswith(MAGNITUDE):
            parameter.data = _value(name, parameter.shape, seed, purpose, n).to(parameter.device)


def _value(name: str, shape: torch.Size, seed: int, purpose: str, n: int) -> Tensor:
    if any(part in ZERO for part in name.split(".")[-2:]):
        return torch.zeros(shape)
    drawn = generator(seed, purpose, n)
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=drawn)
