"""Stable Diffusion 3 and 3.5: a transformer over image and text together, trained by flow matching.

Two CLIP encoders stand side by side, widened by zeros to the width of T5, which follows them; where a model
comes without T5, zeros take its place (Esser et al. 2024, appendix B). This file and its line in
``config.families`` are all that the trainer knows of the family.
"""

from collections.abc import Container, Mapping, Sequence
from typing import Any, cast

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.loaders.single_file_utils import is_t5_in_single_file
from torch import Tensor
from torch.nn import functional

from ..config import Base
from ..config.layer_sizes import ATTENTION
from ..errors import BadInput
from ..objective.flow import FlowMatching
from . import Conditioning
from .latent import LatentFamily, padded_ids

T5_TOKENS = 256
"""As many as diffusers' pipeline reads."""
_TEXT_ATTENTION = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
TARGETS = {
    "attention": (*ATTENTION, *_TEXT_ATTENTION),
    "linear": (
        *(*ATTENTION, *_TEXT_ATTENTION),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    ),
    "conv": (),
}


class StableDiffusion3(LatentFamily):
    """See ``Family``."""

    name = "sd3"
    denoiser_prefix = "transformer"
    targets: Mapping[str, tuple[str, ...]] = TARGETS

    def __init__(self, pipeline: Any, base: Base, device: torch.device) -> None:
        super().__init__(pipeline, base, device)
        self._schedule_config = dict(pipeline.scheduler.config)
        self.process = FlowMatching(
            int(pipeline.scheduler.config.num_train_timesteps), float(pipeline.scheduler.config.shift)
        )
        self._t5_width = int(pipeline.transformer.config.joint_attention_dim)
        self.side_multiple = self.latent_pixels * int(pipeline.transformer.config.patch_size)

    @staticmethod
    def fits(pipeline: Any) -> bool:
        return True

    @classmethod
    def absent(cls, tensors: Container[str]) -> tuple[str, ...]:
        return () if is_t5_in_single_file(tensors) else ("text_encoder_3", "tokenizer_3")

    def token_ids(self, text: str) -> list[list[int]]:
        lengths = [tokenizer.model_max_length for tokenizer in self.tokenizers[:2]] + [T5_TOKENS]
        pairs = zip(self.tokenizers, lengths, strict=False)
        return [padded_ids(tokenizer, text, length) for tokenizer, length in pairs]

    def _say(self, token_ids: Sequence[list[list[int]]]) -> Conditioning:
        columns = self._columns(token_ids)
        encoders: list[Any] = [self.text_encoders[name] for name in sorted(self.text_encoders)]
        said = [encoders[k](columns[k], output_hidden_states=True) for k in (0, 1)]
        clip_BLD = torch.cat([each.hidden_states[-2] for each in said], dim=-1).float()
        clip_BLD = functional.pad(clip_BLD, (0, self._t5_width - clip_BLD.shape[-1]))
        if len(encoders) > 2:
            t5_BLD = cast(Tensor, encoders[2](columns[2])[0]).float()
        else:
            t5_BLD = clip_BLD.new_zeros((len(clip_BLD), T5_TOKENS, self._t5_width))
        return {
            "states": torch.cat([clip_BLD, t5_BLD], dim=1),
            "pooled": torch.cat([each.text_embeds for each in said], dim=-1).float(),
        }

    def sampling_schedule(self) -> Any:
        return FlowMatchEulerDiscreteScheduler.from_config(self._schedule_config)

    def _denoise(self, noisy_BCHW: Tensor, timesteps_B: Tensor, conditioning: Conditioning) -> Tensor:
        predicted = self.denoiser(
            hidden_states=noisy_BCHW,
            timestep=timesteps_B,
            encoder_hidden_states=conditioning["states"].to(noisy_BCHW.dtype),
            pooled_projections=conditioning["pooled"].to(noisy_BCHW.dtype),
        )
        return cast(Tensor, predicted.sample)

    def _check(self, pipeline: Any, base: Base) -> None:
        super()._check(pipeline, base)
        if base.prediction_type or base.zero_terminal_snr:
            key = "prediction_type" if base.prediction_type else "zero_terminal_snr"
            raise BadInput(
                f"base.{key}: {base.model} is trained by flow matching, which has one kind of prediction and "
                "ends in pure noise",
                f"leave {key} out",
            )
        if pipeline.scheduler.config.use_dynamic_shifting:
            raise BadInput(f"base model {base.model}: its noise levels depend on the size of the image")


FAMILY = StableDiffusion3
