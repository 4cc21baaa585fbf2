"""A Stable Diffusion 1.x in miniature, with random weights, and a folder of images to train on.

The UNet has the topology of the real one (same module names), in 0.6 million parameters; the tokenizer is a
real byte-level BPE of 518 tokens. Everything is built locally in about a second and depends on no download.
"""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from trainer.config import RunSpec

WORDS = ("p h", "ph o", "d o", "do g</w>")
"""Merges of the tokenizer: enough that "dog" is one token and the rest falls back to bytes."""


def build_base(folder: Path, *, prediction_type: str = "epsilon", seed: int = 7) -> Path:
    """Write a tiny random pipeline as a diffusers folder and return it."""
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer(folder / "tokenizer")
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=77,
                projection_dim=32,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                hidden_act="quick_gelu",
            )
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=2,
            block_out_channels=(8, 16, 32, 32),
            norm_num_groups=4,
            cross_attention_dim=32,
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        )
        vae = AutoencoderKL(
            block_out_channels=(4, 8, 8, 8),
            norm_num_groups=2,
            layers_per_block=1,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            scaling_factor=0.18215,
            sample_size=64,
        )
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        clip_sample=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def build_tokenizer(folder: Path) -> Any:
    """Write and load a byte-level CLIP tokenizer that can spell any UTF-8 text."""
    from transformers import CLIPTokenizer

    letters = _byte_letters()
    merged = ["".join(merge.split()) for merge in WORDS]
    tokens = [*letters, *(f"{c}</w>" for c in letters), *merged, "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(WORDS) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def _byte_letters() -> list[str]:
    """One printable character for each byte: itself where printable, else the next free one from U+0100."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    order = sorted(printable) + [b for b in range(256) if b not in printable]
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in order]


def build_images(folder: Path, *, count: int = 6, size: tuple[int, int] = (40, 32)) -> Path:
    """Write ``count`` different gradients with captions in a ``metadata.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        image = Image.new("RGB", size)
        image.putdata(
            [
                ((x * 7 + index * 40) % 256, (y * 5 + index * 25) % 256, (x * y) % 256)
                for y in range(size[1])
                for x in range(size[0])
            ]
        )
        image.save(folder / f"{index:02d}.png")
        lines.append(
            json.dumps({"file_name": f"{index:02d}.png", "text": f"a photo of a dog, number {index}"})
        )
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def tiny_spec(
    base_folder: Path,
    images: Path,
    *,
    base: dict[str, Any] | None = None,
    dataset: dict[str, Any] | None = None,
    **blocks: Any,
) -> RunSpec:
    """A run of a few steps that uses accumulation, dropout, caption dropout and flips."""
    return RunSpec.model_validate(
        {
            "base": {
                "model": str(base_folder),
                "rank": 4,
                "alpha": 8.0,
                "lora_dropout": 0.1,
                "resolution": 32,
                "max_train_steps": 6,
                "train_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "learning_rate": 1e-3,
                "lr_scheduler": "cosine",
                "lr_warmup_steps": 1,
                "seed": 3,
                **(base or {}),
            },
            "dataset": {
                "path": str(images),
                "caption_dropout": 0.2,
                "random_flip": True,
                "center_crop": False,
                "val_fraction": 0.2,
                **(dataset or {}),
            },
            "validation": {"every": 0, "timesteps": 4},
            **blocks,
        }
    )
