"""Stable Diffusion XL: two text encoders, and a UNet that is told sizes and crops (Podell et al. 2023).

The layers before the last of both encoders stand side by side; the second one's pooled vector goes with the
sizes. An empty text is all zeros where the model says so (``force_zeros_for_empty_prompt``): what it was
trained to see for a dropped caption.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..config import Base
from . import Conditioning
from .stable_diffusion import UNetFamily


class StableDiffusionXL(UNetFamily):
    """See ``Family``."""

    name = "sdxl"
    extra_conditioning = "text_time"
    usual_cut = 1

    def __init__(self, pipeline: Any, base: Base, device: torch.device) -> None:
        super().__init__(pipeline, base, device)
        self._zeros_for_empty = bool(pipeline.config.force_zeros_for_empty_prompt)

    @staticmethod
    def fits(pipeline: Any) -> bool:
        return True

    def _say(self, token_ids: Sequence[list[list[int]]]) -> Conditioning:
        first: Any = self.text_encoders["text_encoder"]
        second: Any = self.text_encoders["text_encoder_2"]
        ids_BL, ids_2_BL = self._columns(token_ids)
        said = first(ids_BL, output_hidden_states=True)
        said_2 = second(ids_2_BL, output_hidden_states=True)
        states_BLD = torch.cat([said.hidden_states[-2], said_2.hidden_states[-2]], dim=-1).float()
        pooled_BD = cast(Tensor, said_2.text_embeds).float()
        if self._zeros_for_empty:
            nothing = self.token_ids("")
            empty_B = torch.tensor([ids == nothing for ids in token_ids], device=self.device)
            states_BLD = states_BLD.masked_fill(empty_B[:, None, None], 0.0)
            pooled_BD = pooled_BD.masked_fill(empty_B[:, None], 0.0)
        return {"states": states_BLD, "pooled": pooled_BD}

    def size_conditioning(self, sizes_B6: Tensor) -> Conditioning:
        return {"time_ids": sizes_B6}

    def text_identity(self) -> str:
        return f"{self._zeros_for_empty} {super().text_identity()}"

    def _told(self, dtype: torch.dtype, conditioning: Conditioning) -> dict[str, Any]:
        sizes_and_style = {
            "text_embeds": conditioning["pooled"].to(dtype),
            "time_ids": conditioning["time_ids"],  # fp32: half precision would round sizes
        }
        return super()._told(dtype, conditioning) | {"added_cond_kwargs": sizes_and_style}

    def _text_width(self, pipeline: Any) -> int:
        first, second = pipeline.text_encoder.config, pipeline.text_encoder_2.config
        return int(first.hidden_size + second.hidden_size)


FAMILY = StableDiffusionXL
