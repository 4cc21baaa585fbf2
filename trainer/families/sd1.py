"""Stable Diffusion 1.x: a CLIP text encoder, a VAE and a UNet with cross-attention.

Text and images are encoded in fp32 whatever the training precision, so their caches are shared by all runs;
the UNet is kept in the precision asked for and runs under autocast.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from ..cache import tensors_digest
from ..config import Base
from ..errors import BadInput
from ..objective.process import Diffusion
from ..randomness import own_memory
from . import Conditioning, Posterior
from .source import load_pipeline

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""diffusers' names of the attention projections: what its own LoRA scripts train."""
TARGETS = {
    "attention": ATTENTION,
    "linear": (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    "conv": (
        *("conv1", "conv2", "conv_shortcut", "time_emb_proj"),
        *("downsamplers.0.conv", "upsamplers.0.conv"),
    ),
}
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class StableDiffusion1:
    """See ``Family``."""

    name = "sd1"
    denoiser_prefix = "unet"
    targets: Mapping[str, tuple[str, ...]] = TARGETS

    def __init__(self, pipeline: Any, base: Base, device: torch.device) -> None:
        self.device = device
        self._dtype = DTYPES[base.mixed_precision]
        self._tokenizer = pipeline.tokenizer
        self.text_encoders: Mapping[str, nn.Module] = {"text_encoder": _frozen(pipeline.text_encoder, device)}
        self._vae = _frozen(pipeline.vae, device)
        self.latent_pixels = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
        self.latent_channels = int(pipeline.vae.config.latent_channels)
        self._scaling = float(pipeline.vae.config.scaling_factor)
        self._schedule_config = dict(pipeline.scheduler.config)
        if base.prediction_type:
            self._schedule_config["prediction_type"] = base.prediction_type
        alpha_bar_T = pipeline.scheduler.alphas_cumprod.to(device, torch.float32)
        self.process = Diffusion(alpha_bar_T, str(self._schedule_config.get("prediction_type", "epsilon")))
        self.denoiser = _frozen(pipeline.unet, device, self._dtype)

    @classmethod
    def load(cls, base: Base, hub_cache: Path | None) -> "StableDiffusion1":
        """Load and check a model. Raises as ``load_family``."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        _check_precision(base, device)
        pipeline = load_pipeline(base, StableDiffusionPipeline, hub_cache)
        _check_architecture(base, pipeline)
        return cls(pipeline, base, device)

    def token_ids(self, text: str) -> list[list[int]]:
        length = self._tokenizer.model_max_length
        ids = self._tokenizer(text, padding="max_length", max_length=length, truncation=True).input_ids
        return [[int(i) for i in ids]]

    def encode_tokens(self, token_ids: Sequence[list[list[int]]]) -> Conditioning:
        ids_BL = torch.tensor([ids for (ids,) in token_ids], device=self.device)
        states_BLD = cast(Tensor, self.text_encoders["text_encoder"](ids_BL)[0])
        return {"states": states_BLD.float()}

    def size_conditioning(self, sizes_B6: Tensor) -> Conditioning:
        return {}

    @torch.no_grad()
    def encode_image(self, pixels_CHW: Tensor) -> Posterior:
        posterior = self._vae.encode(pixels_CHW[None].to(self.device)).latent_dist
        mean_CHW, std_CHW = posterior.mean[0].float().cpu(), posterior.std[0].float().cpu()
        return Posterior(mean_CHW * self._scaling, std_CHW * self._scaling)

    @torch.no_grad()
    def decode(self, latents_CHW: Tensor) -> Tensor:
        self._vae.to(self.device)
        pixels_BCHW: Tensor = self._vae.decode(latents_CHW[None].to(self.device) / self._scaling).sample
        return pixels_BCHW[0].float().cpu()

    def predict(self, noisy_BCHW: Tensor, timesteps_B: Tensor, conditioning: Conditioning) -> Tensor:
        states_BLD = conditioning["states"].to(self._dtype)
        with self._precision():
            predicted = self.denoiser(
                noisy_BCHW.to(self._dtype), timesteps_B, encoder_hidden_states=states_BLD
            ).sample
        return cast(Tensor, predicted).float()

    def sampling_schedule(self) -> Any:
        return DPMSolverMultistepScheduler.from_config(self._schedule_config)

    def text_identity(self) -> str:
        return tensors_digest(self.text_encoders["text_encoder"].state_dict())

    def image_identity(self) -> str:
        return f"{self._scaling} {tensors_digest(self._vae.state_dict())}"

    def rest_encoders(self, *, texts: bool) -> None:
        if texts:
            self.text_encoders = {}
        self._vae.to("cpu")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _precision(self) -> AbstractContextManager[object]:
        if self._dtype is torch.float32:
            return nullcontext()
        # Its weight cache would hold a stale cast of the adapter across the passes of one step.
        return torch.autocast(self.device.type, self._dtype, cache_enabled=False)


def _frozen(module: Any, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    placed = cast(nn.Module, module).to(device, dtype).requires_grad_(False).eval()
    for tensor in (*placed.parameters(), *placed.buffers()):
        tensor.data = own_memory(tensor)
    return placed


def _check_precision(base: Base, device: torch.device) -> None:
    if base.mixed_precision == "fp16" and device.type == "cpu":
        raise BadInput("base.mixed_precision fp16 needs a CUDA device", "use bf16 or no on a CPU")
    if base.mixed_precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise BadInput(
            f"{torch.cuda.get_device_name(device)} cannot compute in bf16", "set base.mixed_precision to fp16"
        )


def _check_architecture(base: Base, pipeline: Any) -> None:
    unet = pipeline.unet.config
    if unet.in_channels != 4 or unet.addition_embed_type is not None:
        raise BadInput(
            f"base model {base.model}: its UNet has {unet.in_channels} input channels and "
            f"{unet.addition_embed_type or 'no'} extra conditioning; Stable Diffusion 1.x has 4 and none",
            "inpainting and SDXL models cannot be trained",
        )
    if unet.cross_attention_dim != pipeline.text_encoder.config.hidden_size:
        raise BadInput(
            f"base model {base.model}: its UNet expects text states of {unet.cross_attention_dim} numbers, "
            f"its text encoder gives {pipeline.text_encoder.config.hidden_size}",
            "the folder mixes two models",
        )
    _finite(base, pipeline)


def _finite(base: Base, pipeline: Any) -> None:
    for part in ("unet", "vae", "text_encoder"):
        for name, weight in getattr(pipeline, part).named_parameters():
            if not torch.isfinite(weight).all():
                raise BadInput(
                    f"base model {base.model}: {part} {name} holds NaN or infinity", "fetch it again"
                )
