"""The untrained base model: a Stable Diffusion 1.x in miniature, of the same classes and module names.

An autoencoder (32x32 RGB to 8x8x4 latents), a CLIP tokenizer built here, a CLIP text encoder, and a UNet
with cross-attention at its upper level.
"""

from __future__ import annotations

import json
from pathlib import Path

import world
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TEXT_LENGTH = 16
"""Tokens of a prompt: captions have five with their ends, and cross-attention costs by the token."""

TEXT_WIDTH = 64


def byte_characters() -> list[str]:
    """Return CLIP's symbols of the 256 bytes: printable Latin-1 is itself, the rest start at 256."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


def merges_of(word: str) -> list[tuple[str, str]]:
    """Return the byte-pair merges that build a word from left to right, and so make it one token."""
    symbols = [*word[:-1], word[-1] + "</w>"]
    return [("".join(symbols[:end]), symbols[end]) for end in range(1, len(symbols))]


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Return a CLIP tokenizer in which each word of a caption is one token, and any other text is bytes."""
    words = ["handwritten", *world.WORDS]
    merges = list(dict.fromkeys(merge for word in words for merge in merges_of(word)))
    characters = byte_characters()
    tokens = [
        *characters,
        *(character + "</w>" for character in characters),
        *dict.fromkeys(left + right for left, right in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=TEXT_LENGTH)
    for word in words:
        if len(tokenizer(word).input_ids) != 3:
            raise AssertionError(f"{word!r} should be one token, not {tokenizer.tokenize(word)}")
    return tokenizer


def build_models(tokenizer: CLIPTokenizer) -> tuple[AutoencoderKL, UNet2DConditionModel, CLIPTextModel]:
    """Return the three networks, at their random start."""
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=world.RESOLUTION,
    )
    unet = UNet2DConditionModel(
        sample_size=world.RESOLUTION // 4,
        block_out_channels=(48, 96),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        # diffusers' old name for the number of heads, as in Stable Diffusion 1.x
        attention_head_dim=4,
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=16,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return vae, unet, text_encoder
