"""Encodes the images and texts of a run, through the cache.

Each image and text is encoded alone, in fp32, so an entry never depends on what else was encoded with it.
With ``center_crop`` the square in the middle is encoded; without it the whole image, and samples are cut out
of its latents, in steps of one latent.
"""

import hashlib
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .cache import Cache, cache_key
from .config import RunSpec
from .data import EncodedImage, View
from .dataset_files import Example, read_image
from .errors import BadInput
from .families import Conditioning, Family, Posterior
from .randomness import platform_fingerprint

Shape = Literal["square", "whole"]
GEOMETRY = "geometry_4"
"""In an entry: height and width of the file, and what was cut off above and left of the scaled image."""


def encode_texts(
    family: Family, cache: Cache, texts: Iterable[str], alive: Callable[[], None] = lambda: None
) -> dict[str, Conditioning]:
    """Return the conditioning of each text, without a batch axis, on the CPU; ``alive`` is called after
    each."""
    identity = family.text_identity()
    states = {}
    for text in sorted(set(texts)):
        states[text] = _encode_text(family, cache, text, identity)
        alive()
    return states


def _encode_text(family: Family, cache: Cache, text: str, identity: str) -> Conditioning:
    ids = family.token_ids(text)

    def encoded() -> Conditioning:
        with torch.no_grad():
            return {name: part[0].cpu() for name, part in family.encode_tokens([ids]).items()}

    key = cache_key(kind="text", tokens=ids, encoder=identity, platform=platform_fingerprint(family.device))
    return cache.through(key, encoded)


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

    def view(mirrored: bool) -> tuple[View, tuple[int, int]]:
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
        entry = cache.through(key, lambda: _encoded(family, example, spec, shape, mirrored))
        height, width, top, left = (int(number) for number in entry.pop(GEOMETRY))
        if not all(torch.isfinite(part).all() for part in entry.values()):
            raise BadInput(f"dataset image {example.name}: the VAE encodes it as NaN or infinity")
        return View(Posterior(**entry), (top, left)), (height, width)

    views = [view(mirrored) for mirrored in ((False, True) if spec.dataset.random_flip else (False,))]
    return EncodedImage(example.name, example.caption, tuple(seen for seen, _ in views), views[0][1])


def _encoded(
    family: Family, example: Example, spec: RunSpec, shape: Shape, mirrored: bool
) -> dict[str, Tensor]:
    image = read_image(example.path)
    seen = fit(
        ImageOps.mirror(image) if mirrored else image, spec.base.resolution, shape, family.latent_pixels
    )
    pixels_HWC = np.array(seen.image)
    pixels_CHW = torch.from_numpy(pixels_HWC).permute(2, 0, 1).float() / 127.5 - 1
    geometry = torch.tensor([image.height, image.width, *seen.offset])
    return {**family.encode_image(pixels_CHW)._asdict(), GEOMETRY: geometry}


class Fitted(NamedTuple):
    image: Image.Image
    offset: tuple[int, int]
    """Pixels cut off above and left of it, after scaling."""


def fit(image: Image.Image, resolution: int, shape: Shape, multiple: int) -> Fitted:
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
    return Fitted(scaled.crop((left, top, left + kept_width, top + kept_height)), (top, left))
