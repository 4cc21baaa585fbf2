"""What Stable Diffusion 1.x, 2.x and XL share: a UNet with cross-attention, and noise levels of DDPM."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from ..config import Base
from ..config.control import Control
from ..config.layer_sizes import UNET_TARGETS
from ..errors import BadInput
from ..objective.process import Diffusion
from . import Conditioning
from .control import load_control, misfit, residuals
from .hollow import Hollow, cut_of
from .latent import LatentFamily, frozen, place

HIDDEN = "hidden"
"""In a conditioning: what enters the first layer of a hollowed UNet's decoder."""

CONTROL = "control"
"""In a conditioning: what a ControlNet sees, (batch, 3, height, width) in [0, 1]."""
NO_SIGNAL = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
"""Zero-terminal SNR for diffusers' schedulers: sampling must begin at the last timestep (Lin et al. 2024)."""


class UNetFamily(LatentFamily):
    """See ``Family``."""

    denoiser_prefix = "unet"
    targets: Mapping[str, tuple[str, ...]] = UNET_TARGETS
    takes_words = True
    hollows = True
    usual_cut = 3
    """What ``hollow: auto`` means: about two fifths of the UNet's weights."""
    extra_conditioning: str | None = None
    """What the UNet is told besides text, in diffusers' words."""

    def __init__(self, pipeline: Any, base: Base, device: torch.device) -> None:
        super().__init__(pipeline, base, device)
        self._schedule_config = dict(pipeline.scheduler.config)
        if base.prediction_type:
            self._schedule_config["prediction_type"] = base.prediction_type
        if base.zero_terminal_snr:
            self._schedule_config |= NO_SIGNAL
        levels: Any = DDPMScheduler.from_config(self._schedule_config)
        alpha_bar_T: Tensor = levels.alphas_cumprod.to(device, torch.float32)
        self.process = Diffusion(alpha_bar_T, levels.config.prediction_type)
        if base.zero_terminal_snr and self.process.prediction_type != "v_prediction":
            raise BadInput(
                f"base.zero_terminal_snr: {base.model} predicts {self.process.prediction_type}, which says "
                "nothing of an image in pure noise",
                "take a model with v-prediction, or noise_offset for very dark and bright images",
            )

        self._control: Any = None
        self._control_scale = 1.0
        self._hollow: Hollow | None = None
        if base.hollow is not None:
            wanted = self.usual_cut if base.hollow == "auto" else base.hollow
            self.cut = cut_of(self.denoiser, wanted)
            self._hollow = Hollow(self.denoiser, self.cut, device)

    def predict(self, noisy_BCHW: Tensor, timesteps_B: Tensor, conditioning: Conditioning) -> Tensor:
        if self._hollow:
            self._hollow.use(conditioning.get(HIDDEN))
        return super().predict(noisy_BCHW, timesteps_B, conditioning)

    @torch.no_grad()
    def hidden(self, noisy_BCHW: Tensor, timesteps_B: Tensor, conditioning: Conditioning) -> Conditioning:
        assert self._hollow is not None
        whole = super().predict
        return {HIDDEN: self._hollow.hidden(lambda: whole(noisy_BCHW, timesteps_B, conditioning))}

    def inject(self, control: Control, hub_cache: Path | None = None) -> None:
        network = load_control(control, hub_cache, weights=self.device.type != "meta")
        if problem := misfit(network, self.denoiser, self.latent_pixels):
            raise BadInput(
                f"base.control: {control.model} is no ControlNet of this base: {problem}",
                "take one that was made for the family of base.model",
            )
        self._control = frozen(network, self._dtype)
        self._control_scale = control.scale

    def control_conditioning(self, pixels_B3HW: Tensor) -> Conditioning:
        return {CONTROL: pixels_B3HW.to(self.device, non_blocking=True).float() / 255}

    def _denoise(self, noisy_BCHW: Tensor, timesteps_B: Tensor, conditioning: Conditioning) -> Tensor:
        told = self._told(noisy_BCHW.dtype, conditioning)
        seen = conditioning.get(CONTROL)
        injected = {}
        if seen is not None:
            place(self._control, self.device)
            injected = residuals(self._control, self._control_scale, noisy_BCHW, timesteps_B, seen, told)
        return cast(Tensor, self.denoiser(noisy_BCHW, timesteps_B, **told, **injected).sample)

    def _told(self, dtype: torch.dtype, conditioning: Conditioning) -> dict[str, Any]:
        """Return what the UNet is told besides image and noise level, by its own names."""
        return {"encoder_hidden_states": conditioning["states"].to(dtype)}

    def sampling_schedule(self) -> Any:
        return DPMSolverMultistepScheduler.from_config(self._schedule_config)

    def _check(self, pipeline: Any, base: Base) -> None:
        super()._check(pipeline, base)
        _check_schedule(pipeline.scheduler, base)
        unet = pipeline.unet.config
        if unet.addition_embed_type != self.extra_conditioning or unet.class_embed_type is not None:
            told = unet.addition_embed_type or unet.class_embed_type or "nothing"
            raise BadInput(
                f"base model {base.model}: its UNet is told {told} besides text; a {type(pipeline).__name__} "
                f"is told {self.extra_conditioning or 'nothing'}",
                "refiners, upscalers and models that are given an image cannot be trained",
            )
        width = self._text_width(pipeline)
        if unet.cross_attention_dim != width:
            raise BadInput(
                f"base model {base.model}: its UNet expects text states of {unet.cross_attention_dim} "
                f"numbers, its text encoders give {width}",
                "the folder mixes two models",
            )

    def _text_width(self, pipeline: Any) -> int:
        return int(pipeline.text_encoder.config.hidden_size)


def _check_schedule(scheduler: Any, base: Base) -> None:
    """
    Raises:
        BadInput: It has no noise levels of DDPM, or the model's own files say another kind of prediction.
    """
    if not hasattr(scheduler, "alphas_cumprod"):
        raise BadInput(
            f"base model {base.model} has the noise levels of {type(scheduler).__name__}",
            "only models with the noise levels of DDPM can be trained; Playground 2.5 is none of them",
        )
    stated = stated_prediction(scheduler, base)
    if base.prediction_type and stated and stated != base.prediction_type:
        raise BadInput(
            f"base.prediction_type {base.prediction_type}: {base.model} says of itself that it predicts "
            f"{stated}",
            "leave prediction_type out, or take a model of that kind",
        )


def stated_prediction(scheduler: Any, base: Base) -> str | None:
    """Return what the model's own files say that it predicts. A single file says nothing of it."""
    by_default = "prediction_type" in scheduler.config.get("_use_default_values", ())
    if by_default or base.model.endswith(".safetensors"):
        return None
    return str(scheduler.config.prediction_type)
