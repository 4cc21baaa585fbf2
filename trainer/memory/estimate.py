"""Finds what a run will need of a GPU's memory by taking a step of it without numbers.

The base is built from its configuration, what is trained is attached as in a run, and one pass forward and
backward is computed on torch's fake tensors, which have a shape, a type and a lifetime and nothing else. Only
the optimizer is asked with real tensors, one of each shape. No weights are needed, and no GPU.

On a machine without CUDA its rules are followed by hand (``_like_cuda``): that autocast computes norms in
fp32, and that attention in fp32 has no fused kernel whose result is reproducible.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..config import Base, RunSpec
from ..errors import BadInput
from ..families import Conditioning
from ..families.unloaded import unloaded_family
from ..methods import Methods, attach
from ..optim import build_optimizer
from ..texts import is_cached
from .live_bytes import LiveBytes
from .plan import MemoryPlan, Need, Phase, advice

CPU = torch.device("cpu")
TOGETHER = 8
"""Sample images of one prompt that are drawn together, see ``sample``."""
_BETWEEN_STEPS = ("text encoders", "trained parameters", "optimizer", "moving average")
"""What of training stays while samples are drawn."""


def estimate(
    spec: RunSpec, *, micro_batch: int | None = None, hub_cache: Path | None = None, on_cuda: bool = True
) -> MemoryPlan:
    """Return what a run needs, by phase.

    Args:
        micro_batch: The most images of one forward pass; by default ``train_batch_size``.
        on_cuda: Follow CUDA's rules; else those of the CPU.

    Raises:
        BadInput: The base is not described in full, or the spec asks for what it cannot do.
    """
    _refuse_unknown(spec.base)
    base = spec.base.model_copy(update={"compile": False})
    family: Any = unloaded_family(base, hub_cache)
    methods = attach(base, family)
    batch = min(micro_batch or base.train_batch_size, base.samples_per_step)
    with _fake(family, methods), _like_cuda(family, base) if on_cuda else nullcontext():
        weights, removed = _weights(family, methods)
        # Before the pass of training: a hollowed UNet is whole until then.
        before = [*_encoding(family, base, weights), *_preparing(spec, family, weights)]
        drawing = _drawing(family, base, _drawn_together(spec)) if spec.samples else None
        kept, work = _pass(family, methods, base, batch, cached=is_cached(spec))
    training = _training(spec, family, methods, weights, removed, kept, work)
    phases = (*before, training, *([_sampling(training, weights, drawing)] if drawing else []))
    return MemoryPlan(phases, advice(base, micro_batch, phases))


def _refuse_unknown(base: Base) -> None:
    if base.control or "textual_inversion" in base.train:
        key = "base.control" if base.control else "base.train textual_inversion"
        raise BadInput(f"{key}: what it adds is not planned yet", "plan the run without it, as a lower bound")


def size_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def optimizer_bytes(base: Base, shapes: Iterable[torch.Size]) -> int:
    """Return the bytes of the state that the run's optimizer keeps of fp32 parameters of these shapes."""
    known: dict[torch.Size, int] = {}
    for shape in (shapes := list(shapes)):
        if shape not in known:
            parameter = nn.Parameter(torch.zeros(shape))
            parameter.grad = torch.ones(shape)
            optimizer = build_optimizer(base, [([parameter], 1.0)])
            optimizer.step()
            known[shape] = size_of(t for t in optimizer.state[parameter].values() if isinstance(t, Tensor))
    return sum(known[shape] for shape in shapes)


def _weights(family: Any, methods: Methods) -> tuple[Mapping[str, int], int]:
    """Return the bytes of the base's networks without what is trained in them, and of what a cut removes."""
    trained = {id(parameter) for parameter in methods.parameters.values()}
    networks = {"denoiser": family.denoiser, "text encoders": nn.ModuleList(family.text_encoders.values())}
    removed = family.cut.removed if family.cut else ()
    gone = nn.ModuleList(family.denoiser.get_submodule(name) for name in removed)
    sizes = {
        name: size_of(t for t in _tensors(network) if id(t) not in trained)
        for name, network in (networks | {"VAE": family._vae, "removed": gone}).items()
    }
    return sizes, sizes.pop("removed")


def _encoding(family: Any, base: Base, weights: Mapping[str, int]) -> tuple[Phase, Phase]:
    """Return what encoding captions needs, then images: each network leaves before the next one comes."""
    pixels = torch.zeros(3, base.resolution, base.resolution)
    with LiveBytes([*_all_tensors(family), pixels]) as live, torch.no_grad():
        family.encode_tokens([family.token_ids("")])
        captions, live.most = live.most, live.now
        family._vae.encode(pixels[None])
    texts, vae = ({name: weights[name]} for name in ("text encoders", "VAE"))
    return (
        Phase("encoding captions", (*_told(texts), Need("work", captions, "one caption, fp32"))),
        Phase("encoding images", (*_told(vae), Need("work", live.most, "one image, fp32"))),
    )


def _preparing(spec: RunSpec, family: Any, weights: Mapping[str, int]) -> Iterator[Phase]:
    """Yield what is computed with the bare base before the first step."""
    there = {name: weights[name] for name in ("denoiser", "VAE")}
    if spec.prior and not spec.prior.online:
        together = 2 if spec.prior.cfg > 1 else 1
        work = _drawing(family, spec.base, together)
        yield Phase("drawing class images", (*_told(there), work))
    if family.cut:
        with LiveBytes(_all_tensors(family)) as live, torch.no_grad():
            _predicted(family, spec.base, 1, spec.base.resolution // family.latent_pixels, cached=True)
        work = Need("work", live.most, "one prediction")
        yield Phase("computing what is cut off", (Need("denoiser", weights["denoiser"], "weights"), work))


def _training(
    spec: RunSpec,
    family: Any,
    methods: Methods,
    weights: Mapping[str, int],
    removed: int,
    kept: int,
    work: int,
) -> Phase:
    parameters = size_of(methods.parameters.values())
    here = {"denoiser": weights["denoiser"] - removed}
    if not is_cached(spec):
        here["text encoders"] = weights["text encoders"]
    states = optimizer_bytes(spec.base, [p.shape for p in methods.parameters.values()])
    return Phase(
        "training",
        (
            *_told(here),
            Need("trained parameters", parameters, f"{parameters // 4:,} numbers, fp32"),
            Need("gradients", parameters, "fp32"),
            Need("optimizer", states, spec.base.optimizer),
            Need("moving average", parameters if spec.base.ema_decay is not None else 0),
            Need("activations", kept, "kept for the backward pass"),
            Need("work", work, "on top at the highest moment of both passes"),
        ),
    )


def _drawn_together(spec: RunSpec) -> int:
    """How many predictions are made at once for sample images."""
    assert spec.samples is not None
    return min(TOGETHER, len(spec.samples.seeds)) * (2 if spec.samples.cfg != 1 else 1)


def _drawing(family: Any, base: Base, drawn: int) -> Need:
    side = base.resolution // family.latent_pixels
    with LiveBytes(_all_tensors(family)) as live, torch.no_grad():
        _predicted(family, base, drawn, side, cached=True)
        denoising, live.most = live.most, live.now
        family._vae.decode(torch.zeros(1, family.latent_channels, side, side))
    return Need("work", max(denoising, live.most), f"{drawn} predictions together, or the VAE on one image")


def _sampling(training: Phase, weights: Mapping[str, int], drawing: Need) -> Phase:
    stays = [need for need in training.needs if need.what in _BETWEEN_STEPS]
    there = {"denoiser": weights["denoiser"], "VAE": weights["VAE"]}
    return Phase("sampling", (*_told(there), *stays, drawing))


def _told(weights: Mapping[str, int]) -> list[Need]:
    return [Need(name, size, "weights") for name, size in weights.items()]


def _pass(family: Any, methods: Methods, base: Base, batch: int, *, cached: bool) -> tuple[int, int]:
    """Return the bytes that one pass keeps for its way back, and what it needs on top of them at the most."""
    methods.use()
    for network in (family.denoiser, *family.text_encoders.values()):
        network.train(any(parameter.requires_grad for parameter in network.parameters()))
    for parameter in methods.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in methods.parameters.values() if p.grad is not None]
    with LiveBytes([*_all_tensors(family), *methods.parameters.values(), *gradients]) as live:
        side = base.resolution // family.latent_pixels
        loss = _predicted(family, base, batch, side, cached=cached).square().mean()
        kept = live.now
        loss.backward()  # type: ignore[no-untyped-call]
    return kept, live.most - kept


def _predicted(family: Any, base: Base, batch: int, side: int, *, cached: bool) -> Tensor:
    noisy = torch.zeros(batch, family.latent_channels, side, side)
    timesteps = torch.ones(batch, dtype=torch.long)
    with torch.no_grad() if cached else nullcontext():
        told: Conditioning = family.encode_tokens([family.token_ids("")] * batch)
    told |= family.size_conditioning(torch.zeros(batch, 6))
    if family.cut and torch.is_grad_enabled():  # as in training
        with torch.no_grad():
            told |= family.hidden(noisy, timesteps, told)
    predicted: Tensor = family.predict(noisy, timesteps, told)
    return predicted


def _all_tensors(family: Any) -> Iterator[Tensor]:
    for network in (family.denoiser, *family.text_encoders.values(), family._vae):
        yield from _tensors(network)


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()


@contextmanager
def _fake(family: Any, methods: Methods) -> Iterator[FakeTensorMode]:
    """Let everything that is on the meta device be fake tensors of the CPU, which have a place for autocast
    and kernels to go by."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    memo: Any = mode.fake_tensor_converter.meta_converter.tensor_memo
    for parameter in [*_all_tensors(family), *methods.parameters.values()]:
        if isinstance(parameter, nn.Parameter) and not isinstance(parameter, FakeTensor):
            fake = FakeTensor(mode, parameter.data, CPU)
            other = nn.Parameter(fake, requires_grad=parameter.requires_grad)
            memo.clear()  # its reference would forbid the exchange
            torch.utils.swap_tensors(parameter, other)  # type: ignore[no-untyped-call]
    for network in (family.denoiser, *family.text_encoders.values(), family._vae):
        for module in network.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = FakeTensor(mode, buffer, CPU)
    family.device = CPU
    with mode:
        yield mode


@contextmanager
def _like_cuda(family: Any, base: Base) -> Iterator[None]:
    for network in (family.denoiser, *family.text_encoders.values()):
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
