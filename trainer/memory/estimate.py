"""Finds what a run will need of a GPU's memory by taking a step of it without numbers.

The base is built from its configuration, what is trained is attached as in a run, and the loss of a step and
its gradient are computed on torch's fake tensors: see ``numberless``. Only the optimizer is asked with real
tensors, one of each shape. No weights are needed, and no GPU.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import Base, RunSpec
from ..config.textual_inversion import steps_of
from ..families.unloaded import unloaded_family
from ..methods import Methods, attach
from ..optim import build_optimizer
from ..step import in_training
from ..texts import LiveTexts, is_cached
from .live_bytes import LiveBytes
from .numberless import all_tensors, fake, like_cuda, networks, tensors
from .plan import TRAINING, MemoryPlan, Need, Phase, advice
from .training_pass import Pass, training_pass

TOGETHER = 8
"""Sample images of one prompt that are drawn together, see ``sample``."""
_BETWEEN_STEPS = ("text encoders", "ControlNet", "trained parameters", "optimizer", "moving average")
"""What of training stays while samples are drawn."""


class _Stage(NamedTuple):
    """Steps of a run at which the same is trained."""

    name: str
    first: int
    """Of its optimizer steps, counted from 0."""


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
    base = spec.base.model_copy(update={"compile": False})
    family: Any = unloaded_family(base, hub_cache)
    methods = attach(base, family)
    images = min(micro_batch or base.train_batch_size, base.samples_per_step)
    with fake(family, methods), like_cuda(family, base) if on_cuda else nullcontext():
        weights, removed = _weights(family, methods)
        # Before the pass of training: a hollowed UNet is whole until then.
        before = [*_encoding(family, spec, weights), *_preparing(spec, family, weights)]
        drawing = _drawing(family, base, _drawn_together(spec)) if spec.samples else None
        in_training(family, methods)
        passes = [
            (stage, training_pass(spec, family, methods, images, stage.first)) for stage in _stages(base)
        ]
    here = _in_training(spec, weights, removed)
    training = [_training(base, methods, stage, here, measured) for stage, measured in passes]
    sampling = [_sampling(training[-1], weights, drawing)] if drawing else []
    phases = (*before, *training, *sampling)
    return MemoryPlan(phases, advice(base, micro_batch, phases))


def _stages(base: Base) -> Sequence[_Stage]:
    """Return the stages of a run: one, unless words or adapters are trained for a share of it."""
    steps = {what: steps_of(base, what) for what in base.train}
    turns = sorted({turn for of_one in steps.values() for turn in (of_one.start, of_one.stop)})
    stages = [
        _Stage(f"{TRAINING} {' and '.join(what for what in steps if first in steps[what])}", first)
        for first, _ in pairwise(turns)
    ]
    return stages if len(stages) > 1 else [_Stage(TRAINING, 0)]


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
    removed = family.cut.removed if family.cut else ()
    gone = nn.ModuleList(family.denoiser.get_submodule(name) for name in removed)
    sizes = {
        name: size_of(t for t in tensors(network) if id(t) not in trained)
        for name, network in (*networks(family).items(), ("removed", gone))
    }
    return sizes, sizes.pop("removed")


def _encoding(family: Any, spec: RunSpec, weights: Mapping[str, int]) -> Iterator[Phase]:
    """Yield what encoding captions needs, where it is done before, then images: each network leaves before
    the next one comes."""
    if is_cached(spec):
        with LiveBytes(all_tensors(family)) as live, torch.no_grad():
            family.encode_tokens([family.token_ids("")])
        there = {"text encoders": weights["text encoders"]}
        yield Phase("encoding captions", (*_told(there), Need("work", live.most, "one caption, fp32")))
    pixels = torch.zeros(3, spec.base.resolution, spec.base.resolution)
    with LiveBytes([*all_tensors(family), pixels]) as live, torch.no_grad():
        family.encode_image(pixels)
    there = {"VAE": weights["VAE"]}
    yield Phase("encoding images", (*_told(there), Need("work", live.most, "one image, fp32")))


def _preparing(spec: RunSpec, family: Any, weights: Mapping[str, int]) -> Iterator[Phase]:
    """Yield what is computed with the bare base before the first step."""
    there = {name: weights[name] for name in ("denoiser", *([] if is_cached(spec) else ["text encoders"]))}
    if spec.prior and not spec.prior.online:
        work = _drawing(family, spec.base, 2 if spec.prior.cfg > 1 else 1)
        yield Phase("drawing class images", (*_told(there | {"VAE": weights["VAE"]}), work))
    if family.cut:
        with LiveBytes(all_tensors(family)) as live, torch.no_grad():
            _predict(family, spec.base, 1)
        yield Phase("computing what is cut off", (*_told(there), Need("work", live.most, "one prediction")))


def _in_training(spec: RunSpec, weights: Mapping[str, int], removed: int) -> Mapping[str, int]:
    """Return the weights that are there while a run trains."""
    away = {"VAE", *(["text encoders"] if is_cached(spec) else [])}
    there = {name: size for name, size in weights.items() if name not in away}
    return there | {"denoiser": weights["denoiser"] - removed}


def _training(base: Base, methods: Methods, stage: _Stage, here: Mapping[str, int], measured: Pass) -> Phase:
    parameters = size_of(methods.parameters.values())
    gradients = size_of(methods.at(stage.first))
    # What is not trained yet has no state; what rests keeps its own.
    begun = [p.shape for name, p in methods.parameters.items() if methods.begins[name] <= stage.first]
    return Phase(
        stage.name,
        (
            *_told(here),
            Need("trained parameters", parameters, f"{parameters // 4:,} numbers, fp32"),
            Need("gradients", gradients, "fp32"),
            Need("optimizer", optimizer_bytes(base, begun), base.optimizer),
            Need("moving average", parameters if base.ema_decay is not None else 0),
            Need("activations", measured.kept, "kept for the backward pass"),
            Need("work", measured.work, "on top at the highest moment of both passes"),
        ),
    )


def _drawn_together(spec: RunSpec) -> int:
    """How many predictions are made at once for sample images."""
    assert spec.samples is not None
    return min(TOGETHER, len(spec.samples.seeds)) * (2 if spec.samples.cfg != 1 else 1)


def _drawing(family: Any, base: Base, drawn: int) -> Need:
    side = base.resolution // family.latent_pixels
    with LiveBytes(all_tensors(family)) as live, torch.no_grad():
        _predict(family, base, drawn)
        denoising, live.most = live.most, live.now
        family.decode(torch.zeros(family.latent_channels, side, side))
    return Need("work", max(denoising, live.most), f"{drawn} predictions together, or the VAE on one image")


def _predict(family: Any, base: Base, images: int) -> None:
    side = base.resolution // family.latent_pixels
    noisy = torch.zeros(images, family.latent_channels, side, side)
    told = LiveTexts(family).conditioning([""] * images) | family.size_conditioning(torch.zeros(images, 6))
    family.predict(noisy, family.process.fixed_timesteps(1).repeat(images), told)


def _sampling(training: Phase, weights: Mapping[str, int], drawing: Need) -> Phase:
    stays = [need for need in training.needs if need.what in _BETWEEN_STEPS]
    there = {"denoiser": weights["denoiser"], "VAE": weights["VAE"]}
    return Phase("sampling", (*_told(there), *stays, drawing))


def _told(weights: Mapping[str, int]) -> list[Need]:
    return [Need(name, size, "weights") for name, size in weights.items()]
