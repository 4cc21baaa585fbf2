"""Which modules of a base model receive an adapter, and whether one of that rank fits."""

from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from ..config import Base
from ..errors import BadInput
from ..families import Family
from .configs import Told

TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
"""All of CLIP's attention and MLP: readers of kohya's files drop parts of any smaller set."""


def networks(family: Family) -> dict[str, nn.Module]:
    """Return the networks of a family that can be adapted, by the prefix of their names in files."""
    return {family.denoiser_prefix: family.denoiser, **family.text_encoders}


def named_targets(base: Base, family: Family) -> tuple[str, ...]:
    """Return the endings of the denoiser's module names that ``base.targets`` and ``conv_rank`` stand for."""
    targets = family.targets[base.targets] if isinstance(base.targets, str) else base.targets
    if not base.conv_rank:
        return targets
    if not (conv := family.targets.get("conv", ())):
        raise BadInput(
            f"base.conv_rank: {base.model} has no convolutions to adapt",
            "leave conv_rank out",
        )
    return tuple(dict.fromkeys((*targets, *conv)))


def convolutions(network: nn.Module, targets: Iterable[str]) -> list[str]:
    """Return the targets that stand for convolutions with kernels larger than 1. Those with kernels of 1 are
    linear layers, as kohya's scripts have it."""
    found = []
    for target in targets:
        layers = [layer for _, layer in matched(network, (target,))]
        if layers and all(isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1) for layer in layers):
            found.append(target)
    return found


def matched(network: nn.Module, targets: Iterable[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that targets stand for, as PEFT matches them: by their whole name or its ending."""
    targets = tuple(targets)
    endings = tuple(f".{target}" for target in targets)
    for name, module in network.named_modules():
        if name in targets or name.endswith(endings):
            yield name, module


def trained_text_encoders(base: Base, family: Family) -> Mapping[str, nn.Module]:
    """Return the text encoders that can be trained: those of CLIP.

    Raises:
        BadInput: There is none.
    """
    found = {
        name: encoder
        for name, encoder in family.text_encoders.items()
        if all(any(True for _ in matched(encoder, (target,))) for target in TEXT_TARGETS)
    }
    if not found:
        raise BadInput(
            f"base.train_text_encoder: {base.model} has no CLIP text encoder", "train its denoiser only"
        )
    return found


def check_ranks(base: Base, network: nn.Module, prefix: str, told: Told) -> None:
    """Make sure that the targets name modules, and that none is smaller than the rank asked for.

    Raises:
        BadInput: Names the layer, and the largest rank that works for all of them.
    """
    layers = [
        (name, getattr(module, "base_layer", module))
        for name, module in matched(network, told["target_modules"])
    ]
    sizes = {name: size for name, layer in layers if (size := _size(layer)) is not None}
    if not sizes:
        raise BadInput(
            f"base.targets {list(told['target_modules'])} fit no module of {base.model}",
            "name endings of modules such as to_q, to_k, to_v, to_out.0",
        )
    if told["peft_type"] == "LOKR":
        return  # a rank that is too large means whole matrices there
    own = tuple(told.get("rank_pattern", ()))
    for key, rank in (("conv_rank", base.conv_rank), ("rank", base.rank)):
        those = {n: s for n, s in sizes.items() if n.endswith(own) == (key == "conv_rank")} if own else sizes
        if rank is None or not those or (key == "conv_rank" and not own):
            continue
        smallest = min(those, key=lambda name: those[name])
        if rank > those[smallest]:
            raise BadInput(
                f"base.{key} {rank} is above the size of {prefix}.{smallest}, {those[smallest]}",
                f"the largest {key} that works with this model and these targets is {those[smallest]}",
            )


def _size(layer: nn.Module) -> int | None:
    """Return the largest rank that a layer's weights can have."""
    if isinstance(layer, nn.Linear):
        return min(layer.in_features, layer.out_features)
    if isinstance(layer, nn.Conv2d):
        kernel = layer.kernel_size[0] * layer.kernel_size[1]
        return min(layer.in_channels // layer.groups * kernel, layer.out_channels)
    return None
