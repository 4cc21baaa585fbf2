"""Base models of real size and random weights, as diffusers folders in half precision: nothing to download.

The sizes are those of the configurations that Stable Diffusion 1.5 and SDXL 1.0 are published with. The
tokenizer is the small one of the digits example: what is written does not matter here, only how large it is.
"""

from pathlib import Path
from typing import Any

from harness import DIGITS

LENGTH = 77


def build(family: str, target: Path) -> Path:
    """Write a model of ``sd1``, ``sdxl`` or ``small-sdxl`` and return its folder: 2 GB, 7 GB or 30 MB."""
    import torch

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    try:
        _pipeline(family).save_pretrained(target)
    finally:
        torch.set_default_dtype(torch.float32)
    return target


def describe(family: str, target: Path) -> Path:
    """Write such a model without its weights and return its folder: what a memory plan needs."""
    import torch

    with torch.device("meta"):
        pipeline = _pipeline(family)
    pipeline.save_config(target)
    for name, part in pipeline.components.items():
        if part is not None:
            described = part.config if name.startswith("text_encoder") else part
            save = getattr(described, "save_config", None) or described.save_pretrained
            save(target / name)
    return target


def _pipeline(family: str) -> Any:
    from diffusers import (
        DDPMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(DIGITS / "base" / "tokenizer", model_max_length=LENGTH)
    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel(**UNETS[family]),
        "vae": _autoencoder(0.18215 if family == "sd1" else 0.13025, small="small" in family),
        "text_encoder": _text_encoder(tokenizer, 96 if "small" in family else 768),
        "tokenizer": tokenizer,
        "scheduler": DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            steps_offset=1,
        ),
    }
    if family == "sd1":
        return StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    second = _text_encoder(tokenizer, 160 if "small" in family else 1280, projected=True)
    return StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=tokenizer)


UNETS: dict[str, dict[str, Any]] = {
    "sd1": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        "layers_per_block": 2,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}

UNETS["small-sdxl"] = {
    **UNETS["sdxl"],
    "block_out_channels": (32, 64, 128),
    "cross_attention_dim": 256,
    "attention_head_dim": (2, 4, 8),
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 6 * 32 + 160,
}


def _autoencoder(scaling_factor: float, *, small: bool) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(32, 32, 32, 32) if small else (128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
        scaling_factor=scaling_factor,
    )


def _text_encoder(tokenizer: Any, width: int, *, projected: bool = False) -> Any:
    """CLIP's ViT-L/14 at width 768; with a projection and width 1280, OpenCLIP's ViT-bigG/14."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers={768: 12, 1280: 32}.get(width, 2),
        num_attention_heads=20 if width == 1280 else 12 if width == 768 else 4,
        projection_dim=width,
        max_position_embeddings=LENGTH,
        hidden_act="gelu" if projected else "quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
