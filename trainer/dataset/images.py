"""Decoding images and masks, and what is refused of them."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from PIL import Image, ImageFilter, ImageOps, UnidentifiedImageError

from ..errors import BadInput

SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MAX_PIXELS = 64_000_000
"""Larger images are refused before they are decoded: a small file can unpack to gigabytes."""
MASK = ".mask"
"""``x.mask.png`` beside ``x.png`` is its mask, and no image."""
CONTROL = ".control"
"""``x.control.png`` beside ``x.png`` is what a ControlNet sees of it, and no image."""
_ORIENTATION = 0x0112
_ON_ITS_SIDE = range(5, 9)


def is_image(name: str) -> bool:
    """Whether a name is that of an image to train on."""
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES and not path.stem.endswith((MASK, CONTROL))


def is_companion(name: str, ending: str) -> bool:
    """Whether a name is that of what lies beside an image: ``ending`` is ``MASK`` or ``CONTROL``."""
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES and path.stem.endswith(ending)


def read_image(path: Path) -> Image.Image:
    """Decode an image as RGB, upright, transparent parts on white.

    Raises:
        BadInput: It is not a PNG, JPEG or WebP, is damaged, or has more than ``MAX_PIXELS``.
    """
    return _flatten(_decoded(path))


def read_alpha(path: Path) -> Image.Image:
    """Decode the alpha channel of an image, upright; all white for one that has none.

    Raises:
        BadInput: As ``read_image``; or it is transparent everywhere.
    """
    image = _decoded(path)
    if not image.has_transparency_data:
        return Image.new("L", image.size, "white")
    return _not_empty(path, image.convert("RGBA").getchannel("A"), "transparent everywhere")


def read_mask(path: Path, size: tuple[int, int]) -> Image.Image:
    """Decode a mask file as grey levels, upright: white counts, black does not.

    Args:
        size: Width and height of the upright image that it belongs to.

    Raises:
        BadInput: As ``read_image``; it has another size, or is black everywhere.
    """
    mask = _of_size(path, "mask", size).convert("L")
    return _not_empty(path, mask, "black everywhere")


def read_control(path: Path, size: tuple[int, int]) -> Image.Image:
    """Decode the file that a ControlNet sees, as RGB, upright.

    Args:
        size: Width and height of the upright image that it belongs to.

    Raises:
        BadInput: As ``read_image``; or it has another size.
    """
    return _of_size(path, "condition image", size)


def edges(image: Image.Image) -> Image.Image:
    """Return where an image changes, as grey on black: Pillow's ``FIND_EDGES``, which has no border."""
    found = image.convert("L").filter(ImageFilter.FIND_EDGES)
    inner = found.crop((1, 1, image.width - 1, image.height - 1))
    return ImageOps.expand(inner, border=1, fill=0).convert("RGB")


def image_size(path: Path) -> tuple[int, int]:
    """Return height and width of the upright image, without decoding it.

    Raises:
        BadInput: It is not a PNG, JPEG or WebP.
    """
    with _translated(path), _opened(path) as image:
        turned = image.getexif().get(_ORIENTATION) in _ON_ITS_SIDE
        return (image.width, image.height) if turned else (image.height, image.width)


def _decoded(path: Path) -> Image.Image:
    with _translated(path), _opened(path) as image:
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        image.load()
        return ImageOps.exif_transpose(image)


def _opened(path: Path) -> Image.Image:
    with warnings.catch_warnings():
        # Our own limit is lower than the one that Pillow warns of.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(path, formats=tuple(sorted(set(SUFFIXES.values()))))


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except Image.DecompressionBombError:
        raise BadInput(f"{path}: more than {MAX_PIXELS // 1_000_000} megapixels; scale it down") from None
    except UnidentifiedImageError:
        raise BadInput(f"{path}: not a PNG, JPEG or WebP image, or damaged") from None
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged files
        raise BadInput(f"{path}: damaged image: {error}") from None


def _flatten(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _of_size(path: Path, what: str, size: tuple[int, int]) -> Image.Image:
    image = _flatten(_decoded(path))
    if image.size != size:
        raise BadInput(
            f"{path}: the {what} has {image.width}×{image.height} pixels, its image {size[0]}×{size[1]}: "
            "save it at the size of the image"
        )
    return image


def _not_empty(path: Path, mask: Image.Image, what: str) -> Image.Image:
    if mask.getbbox() is None:
        raise BadInput(f"{path}: {what}, so nothing of the image would be trained: take it out")
    return mask
