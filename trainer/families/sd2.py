"""Stable Diffusion 2.x: OpenCLIP's ViT-H and linear projections around attention.

Its text encoder is saved without its last layer, so the last one that is there is the one before the last of
OpenCLIP: what the model was trained with. The models of 768 pixels predict v, those of 512 noise; each says
so in its scheduler's configuration. A single file does not: diffusers then takes it for one that predicts v,
and ``base.prediction_type`` says otherwise.
"""

from typing import Any

from .sd1 import StableDiffusion1


class StableDiffusion2(StableDiffusion1):
    """See ``Family``."""

    name = "sd2"

    @staticmethod
    def fits(pipeline: Any) -> bool:
        return bool(pipeline.unet.config.use_linear_projection)


FAMILY = StableDiffusion2
