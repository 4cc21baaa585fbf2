"""Encodes the images and texts of a run, through the cache.

Each image and text is encoded alone, in fp32, so an entry never depends on what else was encoded with it.
An image is scaled to cover the size that it is trained at, the square of the resolution or its bucket. With
``center_crop`` the middle of that size is encoded; without it the whole image, and samples are cut out of its
latents, in steps of one latent. Its mask goes the same way, and is kept as what each latent counts; and
what a ControlNet sees of it, in pixels.
"""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .cache import Cache, cache_key
from .config import Dataset, RunSpec
from .config.buckets import Size, bucket_sizes, nearest
from .data import EncodedImage, View
from .dataset.folder import Example
from .dataset.images import edges, image_size, read_alpha, read_control, read_image, read_mask
from .errors import BadInput
from .families import Conditioning, Family, Posterior
from .randomness import platform_fingerprint

OFFSET = "offset_2"
"""In an entry: what was cut off above and left of the scaled image, in pixels."""


Made = Callable[[Example, Size, Dataset, bool, int], Tensor]
"""Makes what lies beside an image, at a size, mirrored or not; with the pixels of a latent."""


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
    family.rest_text_encoders()
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
    family.rest_vae()
    return images


def _encode_image(
    family: Family, cache: Cache, example: Example, spec: RunSpec, identity: str
) -> EncodedImage:
    dataset = spec.dataset
    original = image_size(example.path)
    target = nearest(original, bucket_sizes(dataset, spec.base.resolution))
    # The file, not its pixels, is the key: with a full cache no image is decoded.
    way: dict[str, list[int] | bool] = {"target": list(target), "cut": dataset.center_crop}
    file = _file_digest(example.path)

    def view(mirrored: bool) -> View:
        entry = cache.through(
            cache_key(
                kind="image",
                file=file,
                mirrored=mirrored,
                encoder=identity,
                platform=platform_fingerprint(family.device),
                pillow=PIL.__version__,
                **way,
            ),
            lambda: _encoded(family, read_image(example.path), target, dataset, mirrored),
        )
        top, left = (int(number) for number in entry.pop(OFFSET))
        if not all(torch.isfinite(part).all() for part in entry.values()):
            raise BadInput(f"dataset image {example.name}: the VAE encodes it as NaN or infinity")
        return View(Posterior(**entry), (top, left), mask(mirrored), control(mirrored))

    def beside(kind: str, source: Path | None, made: Made, mirrored: bool, **how: str) -> Tensor:
        """What goes the same way as the image."""
        key = cache_key(
            kind=kind,
            file=_file_digest(source) if source else "none",
            image=list(original),
            mirrored=mirrored,
            latent=family.latent_pixels,
            pillow=PIL.__version__,
            **how,
            **way,
        )
        pixels = family.latent_pixels
        return cache.through(key, lambda: {kind: made(example, target, dataset, mirrored, pixels)})[kind]

    def mask(mirrored: bool) -> Tensor | None:
        if dataset.masks == "none":
            return None
        source = example.mask if dataset.masks == "files" else example.path
        return beside("mask", source, _mask, mirrored, masks=dataset.masks)

    def control(mirrored: bool) -> Tensor | None:
        if dataset.control == "none":
            return None
        source = example.control or example.path
        return beside("control", source, _control, mirrored, control=dataset.control)

    return EncodedImage(
        name=example.name,
        caption=example.caption,
        views=tuple(view(mirrored) for mirrored in ((False, True) if dataset.random_flip else (False,))),
        original=original,
        shape=(target[0] // family.latent_pixels, target[1] // family.latent_pixels),
        repeats=example.repeats,
        loss_weight=example.loss_weight,
    )


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _encoded(
    family: Family, image: Image.Image, target: Size, dataset: Dataset, mirrored: bool
) -> dict[str, Tensor]:
    seen = fit(
        ImageOps.mirror(image) if mirrored else image,
        target,
        cut=dataset.center_crop,
        multiple=family.latent_pixels,
    )
    pixels_CHW = torch.from_numpy(np.array(seen.image)).permute(2, 0, 1).float() / 127.5 - 1
    return {**family.encode_image(pixels_CHW)._asdict(), OFFSET: torch.tensor(seen.offset)}


def _mask(example: Example, target: Size, dataset: Dataset, mirrored: bool, latent_pixels: int) -> Tensor:
    """Return the share of each latent's pixels that counts, (1, H, W) in [0, 1]."""
    image = read_image(example.path)
    if dataset.masks == "alpha":
        mask = read_alpha(example.path)
    elif example.mask:
        mask = read_mask(example.mask, image.size)
    else:  # all of it counts
        mask = Image.new("L", image.size, "white")
    seen = fit(
        ImageOps.mirror(mask) if mirrored else mask,
        target,
        cut=dataset.center_crop,
        multiple=latent_pixels,
        resampling=Image.Resampling.BOX,
    )
    levels_1HW = torch.from_numpy(np.array(seen.image))[None].float() / 255
    return torch.nn.functional.avg_pool2d(levels_1HW, latent_pixels)


def _control(example: Example, target: Size, dataset: Dataset, mirrored: bool, latent_pixels: int) -> Tensor:
    """Return what a ControlNet sees of an image, (3, H, W) of bytes, as large as what is encoded of it."""
    image = read_image(example.path)
    shown = read_control(example.control, image.size) if example.control else image
    seen = fit(
        ImageOps.mirror(shown) if mirrored else shown,
        target,
        cut=dataset.center_crop,
        multiple=latent_pixels,
    ).image
    return torch.from_numpy(np.array(seen if example.control else edges(seen))).permute(2, 0, 1)


class Fitted(NamedTuple):
    image: Image.Image
    offset: tuple[int, int]
    """Pixels cut off above and left of it, after scaling."""


def fit(
    image: Image.Image,
    target: Size,
    *,
    cut: bool,
    multiple: int,
    resampling: Image.Resampling = Image.Resampling.LANCZOS,
) -> Fitted:
    """Scale an image so that it just covers ``target``, then take the middle of it.

    Args:
        cut: Take ``target``; else the most whose sides are multiples of ``multiple`` pixels.
    """
    height, width = target
    scale = max(height / image.height, width / image.width)
    covering = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    scaled = image.resize(covering, resampling)
    if not cut:
        width, height = (side - side % multiple for side in scaled.size)
    left, top = (scaled.width - width) // 2, (scaled.height - height) // 2
    return Fitted(scaled.crop((left, top, left + width, top + height)), (top, left))
