"""Writes a diffusers folder as the single file in which Stable Diffusion 3 is traded, with or without T5."""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from support.single_file import VAE_ATTENTION, vae_name
from torch import Tensor

ENDS = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj.": "x_embedder.proj.",
    "time_text_embed.timestep_embedder.linear_1.": "t_embedder.mlp.0.",
    "time_text_embed.timestep_embedder.linear_2.": "t_embedder.mlp.2.",
    "time_text_embed.text_embedder.linear_1.": "y_embedder.mlp.0.",
    "time_text_embed.text_embedder.linear_2.": "y_embedder.mlp.2.",
    "context_embedder.": "context_embedder.",
    "proj_out.": "final_layer.linear.",
    "norm_out.linear.": "final_layer.adaLN_modulation.1.",
}
BLOCK = {
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
QKV = {
    "attn.to_q": ("x_block.attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
    "attn.add_q_proj": (
        "context_block.attn.qkv",
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ),
}
TEXT_ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}


def write_sd3_file(folder: Path, target: Path) -> Path:
    """Write the weights of a diffusers folder into one file and return it."""
    tensors = {
        f"model.diffusion_model.{name}": tensor
        for name, tensor in transformer(
            load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
        ).items()
    }
    for name, tensor in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").items():
        projection = any(f"attentions.0.{part}.weight" in name for part in VAE_ATTENTION if "to_" in part)
        tensors["first_stage_model." + vae_name(name)] = tensor[:, :, None, None] if projection else tensor
    for part, theirs in TEXT_ENCODERS.items():
        if (folder / part).is_dir():
            for name, tensor in load_file(folder / part / "model.safetensors").items():
                tensors[f"text_encoders.{theirs}.transformer.{name}"] = tensor
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target)
    return target


def transformer(given: dict[str, Tensor]) -> dict[str, Tensor]:
    last = max(int(found[1]) for name in given if (found := re.match(r"transformer_blocks\.(\d+)\.", name)))
    tensors: dict[str, Tensor] = {}
    for name, tensor in given.items():
        found = re.fullmatch(r"transformer_blocks\.(\d+)\.(.*)\.(weight|bias)", name)
        if found is None:
            ours, theirs = next(pair for pair in ENDS.items() if name.startswith(pair[0]))
            swapped = name.startswith("norm_out.")
            tensors[name.replace(ours, theirs)] = halves_swapped(tensor) if swapped else tensor
            continue
        number, module, kind = found.groups()
        if module in BLOCK:
            swapped = int(number) == last and module == "norm1_context.linear"
            renamed = f"joint_blocks.{number}.{BLOCK[module]}.{kind}"
            tensors[renamed] = halves_swapped(tensor) if swapped else tensor
        elif module in QKV:
            theirs, three = QKV[module]
            parts = [given[f"transformer_blocks.{number}.{part}.{kind}"] for part in three]
            tensors[f"joint_blocks.{number}.{theirs}.{kind}"] = torch.cat(parts)
    return tensors


def halves_swapped(tensor: Tensor) -> Tensor:
    """Scale and shift come in the other order."""
    first, second = tensor.chunk(2, dim=0)
    return torch.cat([second, first])
