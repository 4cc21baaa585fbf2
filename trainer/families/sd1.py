"""Stable Diffusion 1.x: OpenAI's CLIP, and attention with a head for each channel group."""

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor

from ..config import Base
from ..errors import BadInput
from . import Conditioning
from .stable_diffusion import UNetFamily


class StableDiffusion1(UNetFamily):
    """See ``Family``."""

    name = "sd1"
    skips_layers = True

    @staticmethod
    def fits(pipeline: Any) -> bool:
        return True

    def _say(self, token_ids: Sequence[list[list[int]]]) -> Conditioning:
        (ids_BL,) = self._columns(token_ids)
        encoder: Any = self.text_encoders["text_encoder"]
        if self._clip_skip == 1:
            states_BLD = cast(Tensor, encoder(ids_BL)[0])
        else:
            layers = encoder(ids_BL, output_hidden_states=True).hidden_states
            # transformers of 5.6 and later have no wrapper around it
            states_BLD = getattr(encoder, "text_model", encoder).final_layer_norm(layers[-self._clip_skip])
        return {"states": states_BLD.float()}

    def _check(self, pipeline: Any, base: Base) -> None:
        super()._check(pipeline, base)
        layers = pipeline.text_encoder.config.num_hidden_layers
        if base.clip_skip > layers:
            raise BadInput(f"base.clip_skip {base.clip_skip}: the text encoder has {layers} layers")


FAMILY = StableDiffusion1
