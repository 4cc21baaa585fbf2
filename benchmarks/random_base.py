"""Base models of real size and random weights, as diffusers folders in half precision: nothing to download.

The sizes are those of the configurations that Stable Diffusion 1.5 and SDXL 1.0 are published with. The
tokenizer is the small one of the digits example: what is written does not matter here, only how large it is.
"""

from pathlib import Path
from typing import Any

from harness import DIGITS

LENGTH = 77


def build(family: str, target: Path) -> Path:
    """Write a model of ``sd1`` or ``sdxl`` and return its folder: 2 or 7 GB."""
    import torch
    from diffusers import (
        DDPMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTokenizer

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(DIGITS / "base" / "tokenizer", model_max_length=LENGTH)
        parts: dict[str, Any] = {
            "unet": UNet2DConditionModel(**UNETS[family]),
            "vae": _autoencoder(0.18215 if family == "sd1" else 0.13025),
            "text_encoder": _text_encoder(tokenizer, "small"),
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
            pipeline: Any = StableDiffusionPipeline(
                **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
            )
        else:
            second = _text_encoder(tokenizer, "large")
            pipeline = StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=tokenizer)
        pipeline.save_pretrained(target)
    finally:
        torch.set_default_dtype(torch.float32)
    return target


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


def _autoencoder(scaling_factor: float) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
        scaling_factor=scaling_factor,
    )


def _text_encoder(tokenizer: Any, size: str) -> Any:
    """CLIP's ViT-L/14 or, with a projection, OpenCLIP's ViT-bigG/14."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    large = size == "large"
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=1280 if large else 768,
        intermediate_size=5120 if large else 3072,
        num_hidden_layers=32 if large else 12,
        num_attention_heads=20 if large else 12,
        projection_dim=1280 if large else 768,
        max_position_embeddings=LENGTH,
        hidden_act="gelu" if large else "quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if large else CLIPTextModel)(config)
