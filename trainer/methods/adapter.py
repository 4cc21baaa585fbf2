"""Adapters through PEFT: small trained matrices beside the frozen ones of a network.

LoRA is ``y = W x + (alpha / r) B A x`` (Hu et al. 2021). An adapter starts as no change at all; its other
initial numbers are a function of the run's seed only. It is kept in fp32 whatever the base is kept in.
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


class Adapter:
    """A PEFT adapter of one network. See ``Method``."""

    def __init__(
        self,
        network: Any,
        name: str,
        parameters: dict[str, nn.Parameter],
        metadata: dict[str, str],
        rate: float = 1.0,
    ) -> None:
        self._network = network
        self._name = name
        self.parameters = parameters
        self.rate = rate
        self._metadata = metadata

    def metadata(self) -> dict[str, str]:
        return self._metadata

    def use(self) -> None:
        self._network.set_adapter(self._name)
        self._network.enable_adapters()

    def stand_aside(self) -> None:
        self._network.disable_adapters()

    def updated(self) -> None:
        pass


def denoiser_adapter(base: Base, family: Family, name: str) -> Adapter:
    """Attach the run's adapter to the denoiser.

    Raises:
        BadInput: The targets name no module of this model.
    """
    targets = named_targets(base, family)
    network: Any = family.denoiser
    config = LoraConfig(
        r=base.rank,
        lora_alpha=base.lora_alpha,
        lora_dropout=base.lora_dropout,
        target_modules=list(targets),
        bias="none",
    )
    try:
        network.add_adapter(config, adapter_name=name)
    except ValueError as error:
        raise BadInput(
            f"base.targets {list(targets)} fit no module of {base.model}: {error}",
            "name endings of modules such as to_q, to_k, to_v, to_out.0",
        ) from error
    told = {"r": base.rank, "lora_alpha": base.lora_alpha, "target_modules": sorted(targets)}
    metadata = {"format": "pt", "method": base.adapter, "config": json.dumps(told, sort_keys=True)}
    parameters = _initialised(network, name, f"{family.denoiser_prefix}.", base.seed, family.device)
    return Adapter(network, name, parameters, metadata)


def named_targets(base: Base, family: Family) -> tuple[str, ...]:
    """Return the endings of module names that ``base.targets`` stands for."""
    return family.targets[base.targets] if isinstance(base.targets, str) else base.targets


def _initialised(
    network: nn.Module, name: str, prefix: str, seed: int, device: torch.device
) -> dict[str, nn.Parameter]:
    found = {
        prefix + module.replace(f".{name}.", "."): parameter
        for module, parameter in network.named_parameters()
        if f".{name}." in module
    }
    parameters = {module: found[module] for module in sorted(found)}
    for n, (module, parameter) in enumerate(parameters.items()):
        parameter.data = _initial(module, parameter.shape, seed, n).to(device)
    return parameters


def _initial(name: str, shape: torch.Size, seed: int, n: int) -> Tensor:
    """PEFT's own initial values, in fp32, but from our own randomness: B zero, A uniform by its fan-in."""
    if ".lora_B." in name:
        return torch.zeros(shape)
    return nn.init.kaiming_uniform_(
        torch.empty(shape), a=math.sqrt(5), generator=generator(seed, "adapter", n)
    )
