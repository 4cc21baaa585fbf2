"""Base models in miniature, one of each family, with random weights and the module names of the real ones.

Half a million parameters each; tokenizers are real ones of a few hundred tokens. Everything is built locally
in about a second and depends on no download. Figures that decide code paths are the real ones': activations,
padding tokens, prediction type, scaling, schedules, zeros for the empty prompt.
"""

import json
from pathlib import Path
from typing import Any

WORDS = ("p h", "ph o", "d o", "do g</w>")
"""Merges of the tokenizer: enough that "dog" is one token and the rest falls back to bytes."""
TEXT_WIDTH, TEXT_WIDTH_2 = 32, 48
"""Of the two CLIP encoders: by their widths readers of single files tell them apart."""
SD3_WIDTH = 96
"""Of T5: more than both CLIP encoders together, as in the real one."""


def build_base(
    folder: Path, family: str = "sd1", *, prediction_type: str | None = None, seed: int = 7
) -> Path:
    """Write a tiny random pipeline as a diffusers folder and return it.

    Args:
        family: ``sd1``, ``sd2``, ``sdxl``, ``sd3``, or ``sd3-without-t5``.
        prediction_type: By default that of the real model. Flow matching has none.
    """
    import torch

    build = {
        "sd1": _sd1,
        "sd2": _sd2,
        "sdxl": _sdxl,
        "sd3": _sd3,
        "sd3-without-t5": _sd3_without_t5,
    }[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = build(folder, prediction_type)
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def _sd1(folder: Path, prediction_type: str | None) -> Any:
    tokenizer = build_tokenizer(folder / "tokenizer")
    unet = {"attention_head_dim": 4}
    return _one_encoder(tokenizer, "quick_gelu", unet, prediction_type or "epsilon")


def _sd2(folder: Path, prediction_type: str | None) -> Any:
    tokenizer = build_tokenizer(folder / "tokenizer", pad="!")
    unet = {"attention_head_dim": (2, 4, 8, 8), "use_linear_projection": True}
    return _one_encoder(tokenizer, "gelu", unet, prediction_type or "v_prediction")


def _one_encoder(tokenizer: Any, activation: str, unet: dict[str, Any], prediction_type: str) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        text_encoder=_clip(tokenizer, activation),  # weights are drawn in this order
        unet=_unet_of_four_levels(**unet),
        vae=_vae(0.18215),
        tokenizer=tokenizer,
        scheduler=_ddpm(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(folder: Path, prediction_type: str | None) -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    tokenizer = build_tokenizer(folder / "tokenizer")
    tokenizer_2 = build_tokenizer(folder / "tokenizer_2", pad="!")
    text_encoder = _clip(tokenizer, "quick_gelu")
    text_encoder_2 = _clip(tokenizer_2, "gelu", TEXT_WIDTH_2, projected=True)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=(8, 16, 32),
        norm_num_groups=4,
        cross_attention_dim=TEXT_WIDTH + TEXT_WIDTH_2,
        attention_head_dim=(2, 4, 8),
        transformer_layers_per_block=(1, 2, 3),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + TEXT_WIDTH_2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    scheduler = EulerDiscreteScheduler(
        **_BETAS,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type=prediction_type or "epsilon",
    )
    return StableDiffusionXLPipeline(
        vae=_vae(0.13025),
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=scheduler,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def _sd3(folder: Path, prediction_type: str | None, *, with_t5: bool = True) -> Any:
    import torch
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    assert prediction_type is None, "flow matching has one kind of prediction"
    tokenizer = build_tokenizer(folder / "tokenizer")
    tokenizer_2 = build_tokenizer(folder / "tokenizer_2", pad="!")
    text_encoder = _clip(tokenizer, "quick_gelu", projected=True)
    text_encoder_2 = _clip(tokenizer_2, "gelu", TEXT_WIDTH_2, projected=True)
    # A single file has none for the first encoder: diffusers takes it to be this one.
    torch.nn.init.eye_(text_encoder.text_projection.weight)
    tokenizer_3, text_encoder_3 = _t5() if with_t5 else (None, None)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=SD3_WIDTH,
        pooled_projection_dim=TEXT_WIDTH + TEXT_WIDTH_2,
        pos_embed_max_size=16,
    )
    vae = _vae(1.5305, latent_channels=16, shift=0.0609, quantised=False)
    return StableDiffusion3Pipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        text_encoder_3=text_encoder_3,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        tokenizer_3=tokenizer_3,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
    )


def _sd3_without_t5(folder: Path, prediction_type: str | None) -> Any:
    return _sd3(folder, prediction_type, with_t5=False)


_BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}


def _ddpm(prediction_type: str) -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler(**_BETAS, clip_sample=False, steps_offset=1, prediction_type=prediction_type)


def _clip(tokenizer: Any, activation: str, width: int = TEXT_WIDTH, *, projected: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_act=activation,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def _t5() -> tuple[Any, Any]:
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces = [("▁dog", -1.0), *((letter, -3.0) for letter in letters)]
    tokenizer = T5TokenizerFast(vocab=[*special, *pieces], extra_ids=0, model_max_length=512)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=SD3_WIDTH,
        d_kv=8,
        d_ff=2 * SD3_WIDTH,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return tokenizer, T5EncoderModel(config)


def _unet_of_four_levels(**different: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=(8, 16, 32, 32),
        norm_num_groups=4,
        cross_attention_dim=TEXT_WIDTH,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        **different,
    )


def _vae(scaling: float, latent_channels: int = 4, shift: float | None = None, quantised: bool = True) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4, 8, 8, 8),
        norm_num_groups=2,
        layers_per_block=1,
        latent_channels=latent_channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=scaling,
        shift_factor=shift,
        use_quant_conv=quantised,
        use_post_quant_conv=quantised,
        sample_size=64,
    )


def build_tokenizer(folder: Path, pad: str | None = None) -> Any:
    """Write and load a byte-level CLIP tokenizer that can spell any UTF-8 text.

    Args:
        pad: The padding token; by default the end of the text, as OpenAI's encoder has it.
    """
    from transformers import CLIPTokenizer

    letters = _byte_letters()
    merged = ["".join(merge.split()) for merge in WORDS]
    tokens = [*letters, *(f"{c}</w>" for c in letters), *merged, "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(WORDS) + "\n")
    padding = {} if pad is None else {"pad_token": pad}
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77, **padding)


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
