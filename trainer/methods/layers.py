"""A network's adapters as named fp32 tensors, whatever PEFT calls them and the base is kept in.

The name of a tensor is that of its module, of PEFT's parameter and nothing else:
``mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight``, ``….hada_w1_a``,
``….lora_magnitude_vector``. PEFT's own state dicts name them alike.
"""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from peft import inject_adapter_in_model
from peft.tuners.lora.dora import DoraConv2dLayer, DoraLinearLayer
from peft.tuners.lycoris_utils import LycorisLayer
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .configs import Told, peft_config

MAGNITUDE = "lora_magnitude_vector"


def inject(network: nn.Module, name: str, told: Told, *, dropout: float = 0.0) -> dict[str, nn.Parameter]:
    """Put an adapter into a network, in fp32 and active, and return its parameters in the order of names.

    Their values are PEFT's: random, but no change to what the network computes.

    Raises:
        ValueError: Its targets name no module, or an adapter of this name or of another kind is there.
    """
    kinds = {told["peft_type"], *(config.peft_type.value for config in _configs(network).values())}
    if len(kinds) > 1 or name in _configs(network):
        raise ValueError(
            f"beside {sorted(_configs(network))} there is no place for {name}, {told['peft_type']}"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is another adapter already, which is meant
        inject_adapter_in_model(peft_config(told, dropout=dropout), network, name)
    found = {}
    for module, layer in adapted(network):
        _never_left_out(layer)
        for part, holder in _parts(layer, name):
            if part == MAGNITUDE:
                _in_fp32(holder)
            for inner, parameter in _named(holder):
                parameter.data = parameter.data.float()
                inner = "" if part == MAGNITUDE else inner
                found[f"{module}.{part}{inner}"] = parameter
    return {key: found[key] for key in sorted(found)}


def adapted(network: nn.Module) -> list[tuple[str, Any]]:
    """Return the layers of a network that have adapters, with their names. New tokens are none."""
    return [
        (name, layer)
        for name, layer in network.named_modules()
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, TrainableTokensLayer)
    ]


def use(network: nn.Module, name: str) -> None:
    """Let a network compute with this adapter and no other; gradients flow into this one only."""
    for _, layer in adapted(network):
        layer.set_adapter([name])
        layer.enable_adapters(True)


def stand_aside(network: nn.Module) -> None:
    """Let a network compute without any adapter."""
    for _, layer in adapted(network):
        layer.enable_adapters(False)


def base_weight(layer: Any) -> Tensor:
    """Return the frozen weight beneath an adapter."""
    weight: Tensor = layer.get_base_layer().weight
    return weight.detach()


def set_magnitudes(network: nn.Module, name: str) -> None:
    """Give DoRA the magnitudes of the base's weights, in fp32: with ``B = 0`` nothing then changes.

    The norm of each output's weights, over all inputs; for convolutions over the kernel too.
    """
    for _, layer in adapted(network):
        if name in getattr(layer, MAGNITUDE, {}):
            magnitude = getattr(layer, MAGNITUDE)[name]
            weight = base_weight(layer).float()
            magnitude.weight.data = magnitude.get_weight_norm(weight, torch.zeros_like(weight), 1.0)


def _configs(network: nn.Module) -> dict[str, Any]:
    return dict(getattr(network, "peft_config", {}))


def _parts(layer: Any, name: str) -> Iterator[tuple[str, Any]]:
    for part in layer.adapter_layer_names:
        if name in (holders := getattr(layer, part)):
            yield part, holders[name]


def _named(holder: Any) -> Iterator[tuple[str, nn.Parameter]]:
    if isinstance(holder, nn.Parameter):
        yield "", holder
    else:
        for inner, parameter in holder.named_parameters():
            yield f".{inner}", parameter


def _without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Tensors without numbers have no autocast, and torch refuses to switch it off for them."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


class _InFp32:
    """DoRA's norms in fp32. PEFT takes those of convolutions in the base's precision, in which the quotient
    of magnitude and norm is not 1 before anything was trained."""

    def get_weight_norm(
        self, weight: Tensor, lora_weight: Tensor, scaling: float, adapter_name: str | None = None
    ) -> Tensor:
        with _without_autocast(weight):
            norm: Tensor = super().get_weight_norm(weight.float(), lora_weight.float(), scaling)  # type: ignore[misc]
            return norm

    def get_lora_weight(self, lora_A: Any, lora_B: Any, adapter_name: str | None = None) -> Tensor:
        with _without_autocast(lora_A.weight):
            product: Tensor = super().get_lora_weight(lora_A, lora_B)  # type: ignore[misc]
            return product


class _Linear(_InFp32, DoraLinearLayer):  # type: ignore[misc]
    pass


class _Conv2d(_InFp32, DoraConv2dLayer):  # type: ignore[misc]
    pass


_EXACT = {DoraLinearLayer: _Linear, DoraConv2dLayer: _Conv2d}


def _in_fp32(magnitude: Any) -> None:
    magnitude.__class__ = _EXACT.get(type(magnitude), type(magnitude))


class _Steady:
    """LoHa or LoKr that is always there. In training PEFT leaves out a module whenever a random number is not
    above ``module_dropout``, also at 0: once in 16 million times, by chance that no seed of a run decides."""

    def train(self, mode: bool = True) -> Any:
        super().train(mode)  # type: ignore[misc]
        self.training = False
        return self


@cache
def _steady(kind: type) -> type:
    return type(kind.__name__, (_Steady, kind), {})


def _never_left_out(layer: Any) -> None:
    if isinstance(layer, LycorisLayer) and not isinstance(layer, _Steady):
        layer.__class__ = _steady(type(layer))  # type: ignore[arg-type]
        layer.train()
