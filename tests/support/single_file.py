"""Writes a diffusers folder as the single file in which Stable Diffusion 1.x, 2.x and XL are traded.

The names are those of the original code: latent diffusion, and sgm for XL. Only for the layouts of
``tiny_models`` and the real ones: two resnets per UNet level and a VAE of four levels.
"""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding": "token_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn": "attn",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def write_single_file(folder: Path, target: Path) -> Path:
    """Write the weights of a diffusers folder into one file and return it."""
    tensors: dict[str, Tensor] = {}
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    attended = {int(found[1]) for name in unet if (found := re.match(r"up_blocks\.(\d+)\.attentions", name))}
    for name, tensor in unet.items():
        tensors["model.diffusion_model." + unet_name(name, attended)] = tensor
    for name, tensor in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").items():
        renamed = vae_name(name)
        projection = re.search(r"mid\.attn_1\.(q|k|v|proj_out)\.weight", renamed)
        tensors["first_stage_model." + renamed] = tensor[:, :, None, None] if projection else tensor
    if (folder / "text_encoder_2").is_dir():
        tensors |= clip(folder / "text_encoder", "conditioner.embedders.0.transformer.text_model.")
        tensors |= open_clip(folder / "text_encoder_2", "conditioner.embedders.1.model.")
    elif json.loads((folder / "unet" / "config.json").read_text())["use_linear_projection"]:
        tensors |= open_clip(folder / "text_encoder", "cond_stage_model.model.")
    else:
        tensors |= clip(folder / "text_encoder", "cond_stage_model.transformer.text_model.")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target)
    return target


def clip(folder: Path, prefix: str) -> dict[str, Tensor]:
    encoder = load_file(folder / "model.safetensors")
    return {prefix + name.removeprefix("text_model."): tensor for name, tensor in encoder.items()}


def open_clip(folder: Path, prefix: str) -> dict[str, Tensor]:
    """OpenCLIP keeps queries, keys and values in one matrix, and its last projection transposed."""
    encoder = clip(folder, "")
    tensors: dict[str, Tensor] = {}
    for name, tensor in encoder.items():
        renamed = name
        for ours, theirs in OPEN_CLIP.items():
            renamed = renamed.replace(ours, theirs)
        if name == "text_projection.weight":
            tensors[f"{prefix}text_projection"] = tensor.T
        elif ".q_proj." in name:
            three = [encoder[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"]
            tensors[prefix + renamed.replace(".q_proj.", ".in_proj_")] = torch.cat(three)
        elif ".k_proj." not in name and ".v_proj." not in name:
            tensors[prefix + renamed] = tensor
    return tensors


def unet_name(name: str, attended: set[int]) -> str:
    for ours, theirs in UNET_ENDS.items():
        if name.startswith(ours + "."):
            return theirs + name.removeprefix(ours)
    block, rest = _split(name, r"(down_blocks|up_blocks)\.(\d+)\.|(mid_block)\.")
    level = int(block[1] or 0)
    kind, index, rest = re.fullmatch(r"(\w+)\.(\d+)\.(.*)", rest).groups()  # type: ignore[union-attr]
    if kind == "resnets":
        part, _, end = rest.partition(".")
        rest = f"{RESNET[part]}.{end}"
    place = {"resnets": 0, "attentions": 1}.get(kind)
    if block[2]:  # resnet, attention, resnet
        return f"middle_block.{2 * int(index) if kind == 'resnets' else 1}.{rest}"
    if block[0] == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{3 * (level + 1)}.0.{rest.replace('conv.', 'op.')}"
        return f"input_blocks.{3 * level + int(index) + 1}.{place}.{rest}"
    if kind == "upsamplers":
        return f"output_blocks.{3 * level + 2}.{2 if level in attended else 1}.{rest}"
    return f"output_blocks.{3 * level + int(index)}.{place}.{rest}"


def vae_name(name: str) -> str:
    name = re.sub(r"down_blocks\.(\d)\.", r"down.\1.", name)
    name = re.sub(r"up_blocks\.(\d)\.", lambda found: f"up.{3 - int(found[1])}.", name)
    name = re.sub(r"mid_block\.resnets\.(\d)\.", lambda found: f"mid.block_{int(found[1]) + 1}.", name)
    if "mid_block.attentions.0." in name:
        for ours, theirs in VAE_ATTENTION.items():
            name = name.replace(f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
    for ours, theirs in {
        ".resnets.": ".block.",
        "downsamplers.0.": "downsample.",
        "upsamplers.0.": "upsample.",
        "conv_shortcut": "nin_shortcut",
        "conv_norm_out": "norm_out",
    }.items():
        name = name.replace(ours, theirs)
    return name


def _split(name: str, pattern: str) -> tuple[tuple[str | None, ...], str]:
    found = re.match(pattern, name)
    assert found, name
    return found.groups(), name[found.end() :]
