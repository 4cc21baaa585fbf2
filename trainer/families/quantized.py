"""A frozen network whose weights are kept in fewer bits, and computed with in the precision of the run.

    int8   linear layers; each output's weights are whole numbers of up to 127 times a scale of its own
    nf4    linear layers; bitsandbytes' 4-bit NormalFloat in blocks of 64, their scales in 8 bits themselves
           (Dettmers et al. 2023: double quantisation)
    fp8    linear layers and convolutions; float8_e4m3fn times a scale of each output

A layer brings its weight back for one product, and again in the backward pass. The copy that autograd keeps
under diffusers' layerwise casting, and the input that bitsandbytes' own 8-bit layer keeps, would cost more
than is saved. Norms, biases and the first and last layers, where errors cost most, stay as they are.

The stored numbers are a function of the weights alone. Whoever asks a layer for its ``weight`` gets the one
that is computed with: to PEFT it is an ordinary layer, whatever adapter goes beside it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_input

from ..errors import BadInput

Kind = Literal["int8", "nf4", "fp8"]

KEPT = ("conv_in", "conv_out", "pos_embed", "proj_out")
"""Names of a denoiser's first and last layers."""
BLOCK, BLOCK_OF_SCALES = 64, 256
"""Of nf4: numbers that share a scale, and scales that share one."""
_STORED = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
"""The type of a stored number, and the largest."""
_BYTES = "stored_"
"""Begins the names of buffers."""


def quantize(network: nn.Module, kind: Kind, device: torch.device) -> None:
    """Keep the weights of a network's layers in fewer bits, in place.

    One layer at a time is on the device, where this is quick; the network stays where it is.

    Raises:
        BadInput: bitsandbytes is needed and not there.
    """
    if kind == "nf4":
        _import_bitsandbytes()
    for layer in list(_layers(network, kind)):
        home = layer.weight.device
        stored = _stored(layer.weight.detach().to(device, torch.float32), kind)
        layer.bits = kind
        layer.stored_types = {name: tensor.dtype for name, tensor in stored.items()}
        del layer.weight
        for name, tensor in stored.items():
            # As bytes: what casts a network's floating-point numbers must leave these alone.
            stored_bytes = tensor.contiguous().view(torch.uint8).to(home)
            layer.register_buffer(_BYTES + name, stored_bytes, persistent=False)
        layer.__class__ = QuantizedLinear if isinstance(layer, nn.Linear) else QuantizedConv2d


def _layers(network: nn.Module, kind: Kind) -> Iterator[Any]:
    kinds = (nn.Linear, nn.Conv2d) if kind == "fp8" else nn.Linear
    for name, module in network.named_modules():
        if isinstance(module, kinds) and name.partition(".")[0] not in KEPT:
            yield module


class _Quantized(nn.Module, ABC):
    """What both kinds of layers do. Such a layer is never made, only become: see ``quantize``."""

    bits: Kind
    stored_types: dict[str, torch.dtype]

    @property
    def weight(self) -> Tensor:
        """What the layer computes with, fp32; a copy."""
        return self.restored(torch.float32)

    def restored(self, dtype: torch.dtype) -> Tensor:
        stored = {
            name: cast(Tensor, getattr(self, _BYTES + name)).view(kind)
            for name, kind in self.stored_types.items()
        }
        if self.bits == "nf4":
            return _from_nf4(stored, (cast(Any, self).out_features, cast(Any, self).in_features), dtype)
        exact = stored["numbers"].to(torch.float32) * stored["scales"].view(-1, *_ones(stored["numbers"]))
        return exact.to(dtype)

    def forward(self, given: Tensor) -> Tensor:
        kind = given.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else given.dtype
        result: Tensor = _Product.apply(given.to(dtype), self)  # type: ignore[no-untyped-call]
        return result

    @abstractmethod
    def product(self, given: Tensor, weight: Tensor) -> Tensor:
        """Return what the layer makes of its input with this weight."""

    @abstractmethod
    def input_gradient(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        """Return the gradient of an input of a shape, from that of the output."""


class QuantizedLinear(_Quantized, nn.Linear):  # type: ignore[override]
    def __new__(cls, *given: Any, **named: Any) -> Any:
        return nn.Linear(*given, **named)  # PEFT makes its matrices of the type of the layer beside them

    def product(self, given: Tensor, weight: Tensor) -> Tensor:
        return functional.linear(given, weight, None if self.bias is None else self.bias.to(given.dtype))

    def input_gradient(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        return gradient @ weight


class QuantizedConv2d(_Quantized, nn.Conv2d):  # type: ignore[override]
    def __new__(cls, *given: Any, **named: Any) -> Any:
        return nn.Conv2d(*given, **named)

    def product(self, given: Tensor, weight: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(given.dtype)
        return cast(Tensor, self._conv_forward(given, weight, bias))

    def input_gradient(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        how = (self.stride, self.padding, self.dilation, self.groups)
        return cast(Tensor, cast(Any, conv2d_input)(shape, weight, gradient, *how))


class _Product(torch.autograd.Function):
    """A layer applied to its input, of which nothing is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, layer: _Quantized) -> Tensor:
        ctx.layer, ctx.shape = layer, given.shape
        return layer.product(given, layer.restored(given.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        weight = ctx.layer.restored(gradient.dtype)
        return ctx.layer.input_gradient(gradient, weight, ctx.shape), None


def _stored(weight: Tensor, kind: Kind) -> dict[str, Tensor]:
    if kind == "nf4":
        return _to_nf4(weight)
    dtype, largest = _STORED[kind]
    scales = weight.flatten(1).abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / largest
    numbers = weight / scales.view(-1, *_ones(weight))
    return {"numbers": (numbers.round() if kind == "int8" else numbers).to(dtype), "scales": scales}


def _ones(weight: Tensor) -> tuple[int, ...]:
    """The axes of a weight besides its outputs, as axes of length 1."""
    return (1,) * (weight.ndim - 1)


def _to_nf4(weight: Tensor) -> dict[str, Tensor]:
    """As bitsandbytes' ``quantize_4bit`` with ``compress_statistics``, but for the last bit of a mean, which
    there depends on how a device sums."""
    ops: Any = torch.ops.bitsandbytes
    numbers, absmax = ops.quantize_4bit(weight, BLOCK, "nf4", torch.uint8)
    offset, code = absmax.double().mean().float().view(1), _code().to(weight.device)
    scales, of_scales = ops.quantize_blockwise(absmax - offset, code, BLOCK_OF_SCALES)
    return {
        "numbers": numbers,
        "scales": scales,
        "scales_of_scales": of_scales,
        "offset": offset,
        "code": code,
    }


@cache
def _code() -> Tensor:
    """The 256 values of bitsandbytes' 8-bit numbers."""
    from bitsandbytes.functional import create_dynamic_map

    values: Tensor = create_dynamic_map()
    return values


def _from_nf4(stored: dict[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    ops: Any = torch.ops.bitsandbytes
    absmax = ops.dequantize_blockwise(
        *(stored["scales"], stored["scales_of_scales"], stored["code"]), BLOCK_OF_SCALES, torch.float32
    )
    weight: Tensor = ops.dequantize_4bit(
        stored["numbers"], absmax + stored["offset"], BLOCK, "nf4", shape, dtype
    )
    return weight


def _import_bitsandbytes() -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise BadInput(
            f"base.quantize nf4 needs bitsandbytes: {error}",
            "pip install bitsandbytes, or set base.quantize to int8, which needs nothing",
        ) from error
