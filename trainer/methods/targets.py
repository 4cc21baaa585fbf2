"""Which modules of a base model receive an adapter, and whether one of that rank fits."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..config import Base
from ..config.layer_sizes import Shape, endings, is_convolution, matched, misfit
from ..errors import BadInput
from ..families import Family
from ..families.hollow import Cut

TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
"""All of CLIP's attention and MLP: readers of kohya's files drop parts of any smaller set."""


def networks(family: Family) -> dict[str, nn.Module]:
    """Return the networks of a family that can be adapted, by the prefix of their names in files."""
    return {family.denoiser_prefix: family.denoiser, **family.text_encoders}


def named_targets(base: Base, family: Family) -> tuple[str, ...]:
    """Return the endings of the denoiser's module names that ``base.targets`` and ``conv_rank`` stand for;
    with a cut, the whole names of the modules that it leaves.

    Raises:
        BadInput: The denoiser has no convolutions to adapt, or none of those that a cut leaves.
    """
    if base.conv_rank and not family.targets.get("conv"):
        raise BadInput(
            f"base.conv_rank: {base.model} has no convolutions to adapt",
            "leave conv_rank out",
        )
    found = endings(base, family.targets)
    return found if family.cut is None else _that_stay(base, found, family.cut, layer_shapes(family.denoiser))


def left_out(base: Base, family: Family) -> list[str]:
    """Return the modules that ``base.targets`` and ``conv_rank`` stand for and a cut removes."""
    shapes, cut = layer_shapes(family.denoiser), family.cut
    return [name for name in matched(shapes, endings(base, family.targets)) if cut and cut.removes(name)]


def _that_stay(base: Base, targets: Sequence[str], cut: Cut, shapes: Mapping[str, Shape]) -> tuple[str, ...]:
    """
    Raises:
        BadInput: A cut removes all that the targets stand for, or all that one does which the person named.
    """
    stay: list[str] = []
    for target in targets:
        found = list(matched(shapes, (target,)))
        left = [name for name in found if not cut.removes(name)]
        if found and not left and not isinstance(base.targets, str):
            _refuse(f"base.targets: {target} is", cut)
        stay += left if found else [target]
    if not stay:
        _refuse(f"base.targets {base.targets}: all of them are", cut)
    return tuple(dict.fromkeys(stay))


def _refuse(what: str, cut: Cut) -> NoReturn:
    raise BadInput(
        f"{what} only in layers that base.hollow takes out (cut {cut.number}), where nothing is trained",
        "take out less, or name other targets",
    )


def convolutions(network: nn.Module, targets: Iterable[str]) -> list[str]:
    """Return the targets that stand for convolutions with kernels larger than 1."""
    shapes = layer_shapes(network)
    those = {target: [shapes[name] for name in matched(shapes, (target,))] for target in targets}
    return [target for target, found in those.items() if found and all(map(is_convolution, found))]


def layer_shapes(network: nn.Module) -> dict[str, Shape]:
    """Return the shapes of the weights that can be adapted, by module."""
    found: dict[str, Shape] = {}
    for name, module in network.named_modules():
        layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        # not from the weight, which a quantised layer would bring back for this
        if isinstance(layer, nn.Linear):
            found[name] = (layer.out_features, layer.in_features)
        elif isinstance(layer, nn.Conv2d):
            found[name] = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    return found


def trained_text_encoders(base: Base, family: Family) -> Mapping[str, nn.Module]:
    """Return the text encoders that can be trained: those of CLIP.

    Raises:
        BadInput: There is none.
    """
    shapes = {name: layer_shapes(encoder) for name, encoder in family.text_encoders.items()}
    found = {
        name: encoder
        for name, encoder in family.text_encoders.items()
        if all(any(matched(shapes[name], (target,))) for target in TEXT_TARGETS)
    }
    if not found:
        raise BadInput(
            f"base.train_text_encoder: {base.model} has no CLIP text encoder", "train its denoiser only"
        )
    return found


def text_encoder_rate(base: Base) -> float:
    """Return the learning rate of the text encoders, as a multiple of the run's."""
    return (base.text_encoder_learning_rate or base.learning_rate) / base.learning_rate


def check_ranks(base: Base, network: nn.Module, prefix: str, targets: Iterable[str]) -> None:
    """Make sure that the targets name modules, and that none is smaller than the rank asked for.

    Raises:
        BadInput: Names the layer, and the largest rank that works for all of them.
    """
    if problem := misfit(base, layer_shapes(network), targets):
        key, message, hint = problem
        raise BadInput(f"base.{key}: {prefix} of {base.model}: {message}", hint)
