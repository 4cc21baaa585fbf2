"""What other programs call the modules of a base model. Pure.

kohya's scripts and LyCORIS join a module's path with ``_`` behind the network: ``lora_unet_mid_block_…``,
``lora_te_text_model_…``, of two text encoders ``lora_te1_…`` and ``lora_te2_…``. For SDXL they name blocks as
Stability's own code does (sgm): ``lora_unet_input_blocks_4_1_…``. Such a name cannot be taken apart without
guessing; so every module of the model at hand is named in each of these ways.
"""

import re
from collections.abc import Iterable, Mapping

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

Module = tuple[str, str]
"""A network, such as ``unet``, and the name of a module in it."""

_CLIP_ROOTS = ("text_model", "encoder", "text_projection")
ROOTS = {
    "unet": (
        *("down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out"),
        *("time_embedding", "add_embedding"),
    ),
    "transformer": (
        *("transformer_blocks", "pos_embed", "context_embedder", "time_text_embed"),
        *("norm_out", "proj_out"),
    ),
    "text_encoder": _CLIP_ROOTS,
    "text_encoder_2": _CLIP_ROOTS,
    "text_encoder_3": ("encoder",),
}
"""With which words the names of modules begin, by network."""

TEXT_LEVEL = "text_model."
"""A level of CLIP's names that transformers 5 leaves out and every other program expects."""

_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def known_names(networks: Mapping[str, nn.Module]) -> dict[str, Module]:
    """Return every name by which a file may call a module, kohya's and diffusers'."""
    table: dict[str, Module] = {}
    for network, root in networks.items():
        modules = _adaptable(root)
        for name in modules:
            for called in (name, f"{TEXT_LEVEL}{name}") if network.startswith("text") else (name,):
                table[f"{network}.{called}"] = (network, name)
                for prefix in _kohya_prefixes(network):
                    table[prefix + called.replace(".", "_")] = (network, name)
        if network == "unet":
            per_block = int(getattr(getattr(root, "config", None), "layers_per_block", 2))
            for name, sgm in sgm_names(modules, per_block).items():
                table["lora_unet_" + sgm.replace(".", "_")] = (network, name)
    return table


def sgm_names(modules: Iterable[str], layers_per_block: int) -> dict[str, str]:
    """Return what Stability's code calls the modules of a UNet, by diffusers' names."""
    modules = list(modules)
    with_attention = {
        match[0] for name in modules if (match := re.match(r"up_blocks\.\d+\.attentions", name))
    }
    found = {}
    for name in modules:
        if name in _OUTSIDE:
            found[name] = _OUTSIDE[name]
        elif block := _BLOCK.fullmatch(name):
            side, index, kind, layer, rest = block.groups()
            first = int(index) * (layers_per_block + 1)
            place = first + (layers_per_block if kind.endswith("samplers") else int(layer))
            if side == "down":
                inner = {"resnets": "0", "attentions": "1", "downsamplers": "0"}[kind]
                head, rest = f"input_blocks.{place + 1}.{inner}", "op" if kind == "downsamplers" else rest
            else:
                after = "2" if f"up_blocks.{index}.attentions" in with_attention else "1"
                inner = {"resnets": "0", "attentions": "1", "upsamplers": after}[kind]
                head = f"output_blocks.{place}.{inner}"  # an upsampler shares the last resnet's place
            found[name] = f"{head}.{_RESNET.get(rest, rest) if kind == 'resnets' else rest}"
        elif name.startswith("mid_block."):
            kind = ".".join(name.split(".")[1:3])
            rest = ".".join(name.split(".")[3:])
            if kind in _MIDDLE:
                found[name] = f"middle_block.{_MIDDLE[kind]}.{_RESNET.get(rest, rest)}"
    return found


def _kohya_prefixes(network: str) -> tuple[str, ...]:
    return {
        "unet": ("lora_unet_",),
        "transformer": ("lora_transformer_", "lora_unet_"),
        "text_encoder": ("lora_te_", "lora_te1_"),
        "text_encoder_2": ("lora_te2_",),
        "text_encoder_3": ("lora_te3_",),
    }.get(network, ())


def _adaptable(root: nn.Module) -> list[str]:
    """The layers with weights that PEFT adapts, whether they have an adapter by now or not."""
    found = []
    for name, module in root.named_modules():
        inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(inner, nn.Linear | nn.Conv2d) and ".base_layer" not in name and not _is_part(name):
            found.append(name)
    return found


def _is_part(name: str) -> bool:
    """Whether a layer is an adapter's own matrix."""
    return any(part.startswith(("lora_", "hada_", "lokr_")) for part in name.split("."))
