"""What of an image is encoded and kept: under which key, at which size, and with which mask."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from trainer.cache import Cache
from trainer.config import RunSpec
from trainer.data import EncodedImage, crop, crop_corner, sizes
from trainer.dataset.folder import scan
from trainer.encode import encode_images
from trainer.families import Posterior


class Eye:
    """A VAE that keeps the mean brightness of each 8×8 pixels, and counts what it is shown."""

    device = torch.device("cpu")
    latent_pixels = 8

    def __init__(self, identity: str = "one") -> None:
        self.identity, self.encoded = identity, 0

    def image_identity(self) -> str:
        return self.identity

    def rest_vae(self) -> None:
        pass

    def encode_image(self, pixels_CHW: Tensor) -> Posterior:
        self.encoded += 1
        mean = torch.nn.functional.avg_pool2d(pixels_CHW, 8).mean(0, keepdim=True)
        return Posterior(mean, torch.zeros_like(mean))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One image, dark on its left and light on its right side, with a mask of its left quarter."""
    images = tmp_path / "images"
    images.mkdir()
    levels = np.zeros((40, 64, 3), np.uint8)
    levels[:, 32:] = 255
    Image.fromarray(levels).save(images / "a.png")
    mask = np.zeros((40, 64), np.uint8)
    mask[:, :16] = 255
    Image.fromarray(mask).save(images / "a.mask.png")
    (images / "a.txt").write_text("a")
    return images


def encode(folder: Path, family: Eye | None = None, resolution: int = 32, **dataset: Any) -> EncodedImage:
    spec = RunSpec.model_validate(
        {
            "base": {"model": "m", "resolution": resolution},
            "dataset": {
                "path": str(folder),
                "val_fraction": 0,
                "bucket_min": 16,
                "bucket_step": 8,
                **dataset,
            },
        }
    )
    cache = Cache(folder.parent / "cache")
    (image,) = encode_images(family or Eye(), cache, scan(spec.dataset, folder), spec)  # type: ignore[arg-type]
    return image


def keys(folder: Path, family: Eye | None = None, **dataset: Any) -> frozenset[str]:
    """The cache's entries that this needs."""
    cache = folder.parent / "cache"
    before = {path: path.stat().st_ino for path in cache.rglob("*.safetensors")}
    for path in before:
        path.rename(path.with_suffix(".away"))
    encode(folder, family, **dataset)
    needed = frozenset(path.stem for path in cache.rglob("*.safetensors"))
    for path in before:
        path.with_suffix(".away").replace(path)
    return needed


def test_what_changes_what_is_encoded_changes_the_key_and_nothing_else_does(folder: Path) -> None:
    plain = keys(folder)

    assert len(plain) == 1
    assert keys(folder) == plain
    assert keys(folder, caption_dropout=0.5, trigger="x", shuffle_caption=True) == plain
    assert keys(folder, Eye("other")).isdisjoint(plain)
    assert keys(folder, resolution=24).isdisjoint(plain)
    assert keys(folder, center_crop=False).isdisjoint(plain)
    bucket = keys(folder, buckets=True)
    assert bucket.isdisjoint(plain)
    assert keys(folder, buckets=True, bucket_step=16).isdisjoint(bucket)
    flipped = keys(folder, random_flip=True)
    assert flipped > plain
    assert len(flipped) == 2

    masked = keys(folder, masks="files")
    assert masked > plain, "the image is not encoded again"
    assert keys(folder, masks="alpha") > plain
    assert keys(folder, masks="alpha") != masked
    Image.new("L", (64, 40), 9).save(folder / "a.mask.png")
    assert keys(folder, masks="files") != masked
    assert keys(folder, masks="files") > plain
    assert keys(folder) == plain
    Image.new("RGB", (64, 40)).save(folder / "a.png")
    assert keys(folder).isdisjoint(plain)


def test_an_equal_image_of_another_name_is_encoded_once(folder: Path, tmp_path: Path) -> None:
    family = Eye()
    encode(folder, family)
    other = tmp_path / "other"
    other.mkdir()
    (other / "z.png").write_bytes((folder / "a.png").read_bytes())

    encode(other, family, caption="another")

    assert family.encoded == 1


@pytest.mark.parametrize(
    ("dataset", "shape", "offset", "whole"),
    [
        ({}, (4, 4), (0, 9), (4, 4)),
        ({"center_crop": False}, (4, 4), (0, 1), (4, 6)),
        ({"buckets": True}, (3, 5), (0, 0), (3, 5)),
        ({"buckets": True, "center_crop": False, "bucket_step": 16}, (4, 4), (0, 1), (4, 6)),
    ],
)
def test_an_image_is_cut_to_its_bucket_and_says_where(
    dataset: dict[str, Any],
    shape: tuple[int, int],
    offset: tuple[int, int],
    whole: tuple[int, int],
    folder: Path,
) -> None:
    image = encode(folder, **dataset)

    view = image.views[0]
    assert (image.original, image.shape) == ((40, 64), shape)
    assert (view.offset, tuple(view.posterior.mean_CHW.shape[1:])) == (offset, whole)


def test_a_mask_goes_the_way_of_its_image(folder: Path) -> None:
    image = encode(folder, masks="files", random_flip=True, buckets=True, center_crop=False)

    plain, mirrored = (view.mask_1HW for view in image.views)
    assert plain is not None
    assert mirrored is not None
    assert plain.shape == image.views[0].posterior.mean_CHW.shape
    assert plain[0, 0].tolist() == pytest.approx([1, 0.3, 0, 0, 0], abs=0.3)
    assert torch.equal(mirrored, plain.flip(-1))
    dark = image.views[0].posterior.mean_CHW
    assert dark[0, 0, 0] < dark[0, 0, -1]
    assert image.views[1].posterior.mean_CHW[0, 0, 0] > 0.9


def test_the_alpha_channel_is_a_mask_and_an_image_without_one_counts_whole(folder: Path) -> None:
    assert encode(folder, masks="alpha").views[0].mask_1HW.unique().tolist() == [1]  # type: ignore[union-attr]
    clear = Image.open(folder / "a.png").convert("RGBA")
    clear.putalpha(Image.open(folder / "a.mask.png"))
    clear.save(folder / "a.png")

    mask = encode(folder, masks="alpha", buckets=True).views[0].mask_1HW

    assert mask is not None
    assert mask[0, :, -1].max() == 0
    assert mask[0, :, 0].min() == 1


def test_sizes_of_a_mirrored_crop_are_those_of_the_mirrored_image(folder: Path) -> None:
    """What SDXL is told must be where the crop lies in what it sees."""
    Image.new("RGB", (67, 40)).save(folder / "a.png")
    image = encode(folder, center_crop=False, random_flip=True)
    plain, mirrored = image.views
    corner = crop_corner(mirrored.posterior.mean_CHW, image.shape, 0, 0.99)

    told = sizes(image, mirrored, corner, image.shape, 8).tolist()

    assert told == [40, 67, 0, mirrored.offset[1] + 8 * corner[1], 32, 32]
    assert corner[1] == 2
    assert crop(mirrored.posterior.mean_CHW, image.shape, corner).shape[-2:] == image.shape
    assert plain.offset[1] + mirrored.offset[1] in (54 - 48, 54 - 48 - 1), (
        "54 pixels wide, of which 48 are kept"
    )


def test_the_key_of_an_entry_is_its_files_digest_not_its_pixels(folder: Path) -> None:
    before = hashlib.sha256((folder / "a.png").read_bytes()).hexdigest()
    plain = keys(folder)
    Image.open(folder / "a.png").save(folder / "a.png", compress_level=1)

    assert hashlib.sha256((folder / "a.png").read_bytes()).hexdigest() != before
    assert keys(folder).isdisjoint(plain)


def test_what_a_killed_process_left_in_the_cache_is_removed(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.keep("ab1", lambda: {"x": torch.ones(2)})
    old, new = tmp_path / "ab" / ".tmp-old", tmp_path / "ab" / ".tmp-new"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    cache.remove_unfinished(before=1.0)
    assert sorted(path.name for path in (tmp_path / "ab").iterdir()) == [".tmp-new", "ab1.safetensors"]
