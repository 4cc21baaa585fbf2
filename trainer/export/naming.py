"""The names by which others read an adapter. Pure.

    kohya      lora_unet_down_blocks_0_…_to_q.lora_down.weight, and one alpha per module
    diffusers  unet.down_blocks.0.….to_q.lora_A.weight, the alphas in the header (``headers``)

kohya's files say the true alpha of each module, so that alpha over the rank is the scale that was trained.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..methods.layers import MAGNITUDE
from .modules import AdaptedModule

_KOHYA_PARTS = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    MAGNITUDE: "dora_scale",
}
ALPHA = "alpha"


def kohya_tensors(modules: Iterable[AdaptedModule], family: str) -> dict[str, Tensor]:
    """Return an adapter's tensors as kohya's scripts and LyCORIS name them, which A1111 and ComfyUI read."""
    renamed: dict[str, Tensor] = {}
    for module in modules:
        name = kohya_name(module, family)
        tensors = dict(module.tensors)
        if {"lokr_w1", "lokr_w2"} <= tensors.keys():
            # Where neither factor has a rank, readers take the scale for 1: it goes into the small factor.
            tensors["lokr_w1"] = tensors["lokr_w1"] * module.scale
        for part, tensor in tensors.items():
            renamed[f"{name}.{_KOHYA_PARTS.get(part, part)}"] = _shaped(part, tensor, module)
        # Not in the file's type: a rounded scale scales everything.
        renamed[f"{name}.{ALPHA}"] = torch.tensor(module.scale * module.rank)
    return renamed


def kohya_name(module: AdaptedModule, family: str) -> str:
    """Return a module's name in kohya's files: all of it but the part."""
    if module.network == "unet":
        return "lora_unet_" + module.name.replace(".", "_")
    number = module.network.removeprefix("text_encoder").removeprefix("_") or "1"
    prefix = "lora_te_" if family in ("sd1", "sd2") else f"lora_te{number}_"
    return prefix + _with_level(module.name).replace(".", "_")


def diffusers_tensors(modules: Iterable[AdaptedModule], *, fold: bool = False) -> dict[str, Tensor]:
    """Return a LoRA's tensors as diffusers names them.

    Args:
        fold: Multiply the scale into B, for readers that know no header: alpha is the rank then.
    """
    renamed: dict[str, Tensor] = {}
    for module in modules:
        is_text = module.network.startswith("text_encoder")
        name = _with_level(module.name) if is_text else module.name
        for part, tensor in module.tensors.items():
            scaled = tensor * module.scale if fold and part == "lora_B.weight" else tensor
            # transformers, which puts adapters onto text encoders, reads a magnitude by its full name only.
            ending = ".weight" if is_text and part == MAGNITUDE else ""
            renamed[f"{module.network}.{name}.{part}{ending}"] = scaled
    return renamed


def _shaped(part: str, tensor: Tensor, module: AdaptedModule) -> Tensor:
    """DoRA's magnitudes with one axis per axis of the weight, the first of them that of the outputs."""
    if part != MAGNITUDE:
        return tensor
    return tensor.reshape(-1, *(1 for _ in range(module.tensors["lora_A.weight"].ndim - 1)))


def _with_level(name: str) -> str:
    """transformers 5 leaves out a level of CLIP's names, which every other program expects."""
    return name if name.startswith(("text_model.", "encoder.block.")) else f"text_model.{name}"
