"""Networks that compute without numbers: torch's fake tensors have a shape, a type and a lifetime, no more.

On a machine without CUDA its rules are followed by hand: that autocast computes norms in fp32, and that
attention in fp32 has no fused kernel whose result is reproducible.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..config import Base
from ..methods import Methods

CPU = torch.device("cpu")


def networks(family: Any) -> Mapping[str, nn.Module]:
    """Return all that a family has of weights, by what it is to a person."""
    found = {
        "denoiser": family.denoiser,
        "text encoders": nn.ModuleList(family.text_encoders.values()),
        "VAE": family._vae,
    }
    control = getattr(family, "_control", None)
    return found if control is None else found | {"ControlNet": control}


def tensors(network: nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()


def all_tensors(family: Any) -> Iterator[Tensor]:
    for network in networks(family).values():
        yield from tensors(network)


@contextmanager
def fake(family: Any, methods: Methods) -> Iterator[None]:
    """Let everything that is on the meta device be fake tensors of the CPU, which have a place for autocast
    and kernels to go by; within, new tensors are fake, too."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    memo: Any = mode.fake_tensor_converter.meta_converter.tensor_memo
    for parameter in [*all_tensors(family), *methods.parameters.values()]:
        if isinstance(parameter, nn.Parameter) and not isinstance(parameter, FakeTensor):
            made = FakeTensor(mode, parameter.data, CPU)
            other = nn.Parameter(made, requires_grad=parameter.requires_grad)
            memo.clear()  # its reference would forbid the exchange
            torch.utils.swap_tensors(parameter, other)  # type: ignore[no-untyped-call]
    for network in networks(family).values():
        for module in network.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = FakeTensor(mode, buffer, CPU)
    for name, value in vars(family.process).items():
        if isinstance(value, Tensor):
            setattr(family.process, name, FakeTensor(mode, value, CPU))
    family.device = CPU
    with mode:
        yield


@contextmanager
def like_cuda(family: Any, base: Base) -> Iterator[None]:
    """Follow CUDA's rules, within and in the networks from then on."""
    for network in networks(family).values():
        for module in network.modules():
            if isinstance(module, nn.LayerNorm | nn.GroupNorm):
                module.forward = partial(_norm_in_fp32, module)  # type: ignore[method-assign]
    with sdpa_kernel(SDPBackend.MATH) if base.mixed_precision == "no" else nullcontext():
        yield


def _norm_in_fp32(norm: Any, given: Tensor) -> Tensor:
    """What autocast does on CUDA; the networks compute in fp32 without it."""
    with torch.autocast("cpu", enabled=False):
        weight, bias = (None if part is None else part.float() for part in (norm.weight, norm.bias))
        if isinstance(norm, nn.LayerNorm):
            return functional.layer_norm(given.float(), norm.normalized_shape, weight, bias, norm.eps)
        return functional.group_norm(given.float(), norm.num_groups, weight, bias, norm.eps)
