"""Which layers of a denoiser an adapter is put beside, and whether its rank fits them.

Known without importing torch: before anything is launched the sizes are read from the model's files.
"""

from collections.abc import Iterable, Iterator, Mapping
from math import prod

from .adapter import AdapterKeys

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""diffusers' names of the attention projections: what its own LoRA scripts train."""
UNET_TARGETS: Mapping[str, tuple[str, ...]] = {
    "attention": ATTENTION,
    "linear": (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    "conv": (
        *("conv1", "conv2", "conv_shortcut", "time_emb_proj"),
        *("downsamplers.0.conv", "upsamplers.0.conv"),
    ),
}
"""Endings of the module names of the UNets of Stable Diffusion 1.x, 2.x and XL by ``TargetSet``; ``conv``:
those that ``conv_rank`` adds."""

Shape = tuple[int, ...]
"""Of a weight: outputs, inputs, and for convolutions the kernel."""


def endings(keys: AdapterKeys, targets: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Return the endings of module names that ``targets`` and ``conv_rank`` of a run stand for."""
    named = targets[keys.targets] if isinstance(keys.targets, str) else keys.targets
    return tuple(dict.fromkeys((*named, *(targets["conv"] if keys.conv_rank else ()))))


def matched(names: Iterable[str], targets: Iterable[str]) -> Iterator[str]:
    """Yield the modules that targets stand for, as PEFT matches them: by their whole name or its ending."""
    targets = tuple(targets)
    ends = tuple(f".{target}" for target in targets)
    for name in names:
        if name in targets or name.endswith(ends):
            yield name


def is_convolution(shape: Shape) -> bool:
    """Whether a layer has a kernel larger than 1. The others count as linear, as in kohya's scripts."""
    return len(shape) > 2 and prod(shape[2:]) > 1


def misfit(
    keys: AdapterKeys, shapes: Mapping[str, Shape], targets: Iterable[str]
) -> tuple[str, str, str] | None:
    """Return the key that does not fit a network, why not, and what does; or None.

    Args:
        shapes: Of the weights of all layers, by module.
        targets: Endings of module names.
    """
    targets = tuple(targets)
    sizes = {name: shapes[name] for name in matched(shapes, targets)}
    if not sizes:
        hint = "name endings of modules such as to_q, to_k, to_v, to_out.0"
        return "targets", f"{list(targets)} fit no module of it", hint
    if keys.adapter == "lokr":
        return None  # a rank that is too large means whole matrices there
    for name, shape in sorted(sizes.items(), key=lambda item: min(item[1][0], prod(item[1][1:]))):
        largest = min(shape[0], prod(shape[1:]))
        key = "conv_rank" if keys.conv_rank and is_convolution(shape) else "rank"
        if (rank := getattr(keys, key)) > largest:
            hint = f"the largest {key} that works with this model and these targets is {largest}"
            return key, f"{rank} is above the size of {name}, {largest}", hint
    return None
