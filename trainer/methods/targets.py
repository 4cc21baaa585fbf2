"""Which modules of a base model receive an adapter, and whether one of that rank fits."""

from collections.abc import Iterable, Mapping

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..config import Base
from ..config.layer_sizes import Shape, endings, is_convolution, matched, misfit
from ..errors import BadInput
from ..families import Family

TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
"""All of CLIP's attention and MLP: readers of kohya's files drop parts of any smaller set."""


def networks(family: Family) -> dict[str, nn.Module]:
    """Return the networks of a family that can be adapted, by the prefix of their names in files."""
    return {family.denoiser_prefix: family.denoiser, **family.text_encoders}


def named_targets(base: Base, family: Family) -> tuple[str, ...]:
    """Return the endings of the denoiser's module names that ``base.targets`` and ``conv_rank`` stand for.

    Raises:
        BadInput: The denoiser has no convolutions to adapt.
    """
    if base.conv_rank and not family.targets.get("conv"):
        raise BadInput(
            f"base.conv_rank: {base.model} has no convolutions to adapt",
            "leave conv_rank out",
        )
    return endings(base, family.targets)


def convolutions(network: nn.Module, targets: Iterable[str]) -> list[str]:
    """Return the targets that stand for convolutions with kernels larger than 1."""
    shapes = layer_shapes(network)
    those = {target: [shapes[name] for name in matched(shapes, (target,))] for target in targets}
    return [target for target, found in those.items() if found and all(map(is_convolution, found))]


def layer_shapes(network: nn.Module) -> dict[str, Shape]:
    """Return the shapes of the weights that can be adapted, by module."""
    found = {}
    for name, module in network.named_modules():
        layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(layer, nn.Linear | nn.Conv2d):
            found[name] = tuple(layer.weight.shape)
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


def check_ranks(base: Base, network: nn.Module, prefix: str, targets: Iterable[str]) -> None:
    """Make sure that the targets name modules, and that none is smaller than the rank asked for.

    Raises:
        BadInput: Names the layer, and the largest rank that works for all of them.
    """
    if problem := misfit(base, layer_shapes(network), targets):
        key, message, hint = problem
        raise BadInput(f"base.{key}: {prefix} of {base.model}: {message}", hint)
