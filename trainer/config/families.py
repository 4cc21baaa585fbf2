"""Which base models can be trained, by the class that their ``model_index.json`` names.

Known without importing torch, so that a sweep file is refused before anything is launched. A family is a
module of this name in ``trainer.families``, whose class is called ``FAMILY``; of several, the first whose
``fits`` says so.
"""

FAMILIES: dict[str, tuple[str, ...]] = {
    "StableDiffusionPipeline": ("sd2", "sd1"),
    "StableDiffusionXLPipeline": ("sdxl",),
    "StableDiffusion3Pipeline": ("sd3",),
}
FILE_KINDS = {
    "v1": "StableDiffusionPipeline",
    "v2": "StableDiffusionPipeline",
    "xl_base": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "sd35_medium": "StableDiffusion3Pipeline",
    "sd35_large": "StableDiffusion3Pipeline",
}
"""diffusers' names of what it takes a single file for, by the pipeline that it then builds."""
DENOISERS = {"StableDiffusion3Pipeline": "transformer"}
"""The folder of the network that is trained, where it is not ``unet``."""
SKIPPING_LAYERS = ("StableDiffusionPipeline",)
"""Where ``clip_skip`` means something: the others were trained on one fixed layer of each text encoder."""
FLOW_MATCHING = ("StableDiffusion3Pipeline",)
CONVOLUTIONAL = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
"""Whose denoiser has convolutions that an adapter can be put beside."""
