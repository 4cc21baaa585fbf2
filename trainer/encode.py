"""Encodes the images and texts of a run, through the cache.

Each image and text is encoded alone, in fp32, so an entry never depends on what else was encoded with it.
With ``center_crop`` the square in the middle is encoded; without it the whole image, and samples are cut out
of its latents, in steps of one latent.
"""

import hashlib
from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .cache import Cache, cache_key
from .config import RunSpec
from .data import EncodedImage
from .dataset_files import Example, read_image
from .errors import BadInput
from .families import Family, Posterior
from .randomness import platform_fingerprint

Shape = Literal["square", "whole"]


def encode_texts(
    family: Family, cache: Cache, texts: Iterable[str], alive: Callable[[], None] = lambda: None
) -> dict[str, Tensor]:
    """Return the states (L, D) of each text; ``alive`` is called after each."""
    identity = family.text_identity()
    states = {}
    for text in sorted(set(texts)):
        states[text] = _encode_text(family, cache, text, identity)
        alive()
    return states


def _encode_text(family: Family, cache: Cache, text: str, identity: str) -> Tensor:
    ids = family.token_ids(text)
    key = cache_key(kind="text", tokens=ids, encoder=identity, platform=platform_fingerprint(family.device))
    return cache.through(key, lambda: {"states": family.encode_tokens(ids)})["states"]


def encode_images(
    family: Family,
    cache: Cache,
    examples: Iterable[Example],
    spec: RunSpec,
    alive: Callable[[], None] = lambda: None,
) -> list[EncodedImage]:
    """Return the latents of each example, in the same order; ``alive`` is called after each.

    Raises:
        BadInput: An image is damaged, or the VAE gives NaN for it. The message names it.
    """
    identity = family.image_identity()
    images = []
    for example in examples:
        images.append(_encode_image(family, cache, example, spec, identity))
        alive()
    return images


def _encode_image(
    family: Family, cache: Cache, example: Example, spec: RunSpec, identity: str
) -> EncodedImage:
    shape: Shape = "square" if spec.dataset.center_crop else "whole"
    with example.path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()

    def view(mirrored: bool) -> Posterior:
        # The file, not its pixels, is the key: with a full cache no image is decoded.
        key = cache_key(
            kind="image",
            file=digest,
            resolution=spec.base.resolution,
            shape=shape,
            mirrored=mirrored,
            encoder=identity,
            platform=platform_fingerprint(family.device),
            pillow=PIL.__version__,
        )
        entry = cache.through(
            key, lambda: family.encode_image(_pixels(family, example, spec, shape, mirrored))._asdict()
        )
        if not all(torch.isfinite(part).all() for part in entry.values()):
            raise BadInput(f"dataset image {example.name}: the VAE encodes it as NaN or infinity")
        return Posterior(**entry)

    views = (view(False), view(True)) if spec.dataset.random_flip else (view(False),)
    return EncodedImage(example.name, example.caption, views)


def _pixels(family: Family, example: Example, spec: RunSpec, shape: Shape, mirrored: bool) -> Tensor:
    image = fit(read_image(example.path), spec.base.resolution, shape, family.latent_pixels)
    pixels_HWC = np.array(ImageOps.mirror(image) if mirrored else image)
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1).float() / 127.5 - 1


def fit(image: Image.Image, resolution: int, shape: Shape, multiple: int) -> Image.Image:
    """Scale the shorter side to ``resolution``, then cut the middle: a square, or the most that
    is a ``multiple`` of pixels."""
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    scaled = image.resize((width, height), Image.Resampling.LANCZOS)
    if shape == "square":
        kept_width = kept_height = resolution
    else:
        kept_width, kept_height = (side - side % multiple for side in scaled.size)
    left, top = (width - kept_width) // 2, (height - kept_height) // 2
    return scaled.crop((left, top, left + kept_width, top + kept_height))
