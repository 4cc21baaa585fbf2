"""A folder of images with captions, as files: what is in it, what is wrong with it, and its digest.

Captions come from ``metadata.jsonl`` (one object a line with ``file_name`` and ``text``, ``prompt`` or
``caption``) or from ``x.txt`` beside ``x.png``. Hidden files do not count. Examples are ordered by their
path, so that an example's index means the same on every machine. Imports no torch: the control plane calls it
too.
"""

import json
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image, ImageOps, UnidentifiedImageError

from storage.content.hashing import hashed
from storage.content.store import LocalContent

from .config import Dataset
from .errors import BadInput

SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MAX_PIXELS = 64_000_000
"""Larger images are refused before they are decoded: a small file can unpack to gigabytes."""
METADATA = "metadata.jsonl"
CAPTION_KEYS = ("text", "prompt", "caption")
_SHOWN = 10
"""How many problems of one kind a message lists."""


@dataclass(frozen=True, slots=True)
class Example:
    """One training image."""

    name: str
    """Path inside the dataset folder, with ``/``."""
    path: Path
    caption: str


def scan(dataset: Dataset, folder: Path) -> list[Example]:
    """Return the examples in ``folder``, ordered by name, with ``[trigger]`` replaced in captions.

    Looks at names and captions, not at pixels: ``read_image`` does, one image at a time.

    Raises:
        BadInput: With everything that is wrong, not only the first thing.
    """
    examples, found = _examine(dataset, folder)
    if found:
        raise BadInput(f"dataset {folder}: {_listed(found)}", "fix the folder; nothing was trained")
    return examples


def problems(dataset: Dataset) -> list[str]:
    """Say everything that is wrong with a dataset, decoding every image. Empty: it can be trained on."""
    folder = Path(dataset.path).expanduser()
    examples, found = _examine(dataset, folder)
    for example in examples:
        try:
            read_image(example.path)
        except BadInput as error:
            found.append(str(error))
    return found


def dataset_content(folder: Path, memory: Path | None = None) -> LocalContent:
    """Return all images, captions and metadata of a folder.

    Args:
        memory: See ``storage.content.hashing``.
    """
    return hashed("", dict(_files(folder)), memory)


def dataset_digest(folder: Path, memory: Path | None = None) -> str:
    """Return the sha256 over names and contents of all images, captions and metadata.

    It is the digest of the lines ``<sha256 of the file>  <name>`` in the order of names.
    """
    return dataset_content(folder, memory).digest


def held_out(count: int, val_fraction: float) -> int:
    """Return how many of ``count`` images are kept to validate: at least one if the fraction is above 0."""
    return max(1, round(count * val_fraction)) if val_fraction else 0


def fill_trigger(text: str, trigger: str | None) -> str:
    """Replace ``[trigger]`` in a caption or prompt."""
    return text if trigger is None else text.replace("[trigger]", trigger)


def read_image(path: Path) -> Image.Image:
    """Decode an image as RGB, upright, transparent parts on white.

    Raises:
        BadInput: It is not a PNG, JPEG or WebP, is damaged, or has more than ``MAX_PIXELS``.
    """
    try:
        with warnings.catch_warnings():
            # Our own limit is lower than the one that Pillow warns of.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(path, formats=tuple(sorted(set(SUFFIXES.values()))))
        with opened as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            image.load()
            return _flatten(ImageOps.exif_transpose(image))
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


def _examine(dataset: Dataset, folder: Path) -> tuple[list[Example], list[str]]:
    if not folder.is_dir():
        return [], ["no such folder" if not folder.exists() else "not a folder"]
    images = {name: path for name, path in _files(folder) if path.suffix.lower() in SUFFIXES}
    if not images:
        return [], ["no PNG, JPEG or WebP image in it"]
    captions, found = _captions(folder, images)
    examples, missing = [], []
    for name, path in images.items():
        caption = captions.get(name) or dataset.caption
        if caption is None:
            missing.append(name)
        else:
            examples.append(Example(name, path, fill_trigger(caption, dataset.trigger)))
    if missing and not found:  # a broken metadata file explains missing captions by itself
        found.append(f"{len(missing)} of {len(images)} images have no caption: {_listed(missing, ', ')}")
    if dataset.trigger is None and any("[trigger]" in example.caption for example in examples):
        found.append("captions contain [trigger], but dataset.trigger is not set")
    if len(images) - held_out(len(images), dataset.val_fraction) < 1:
        found.append(
            f"val_fraction {dataset.val_fraction} of {len(images)} images leaves none to train on; "
            "lower it or add images"
        )
    return examples, found


def _captions(folder: Path, images: dict[str, Path]) -> tuple[dict[str, str], list[str]]:
    captions: dict[str, str] = {}
    found: list[str] = []
    for name, path in images.items():
        beside = path.with_suffix(".txt")
        if beside.is_file():
            try:
                captions[name] = beside.read_text("utf-8").strip()
            except UnicodeDecodeError:
                found.append(f"{beside.name}: not UTF-8")
    metadata = folder / METADATA
    if metadata.is_file():
        for number, line in enumerate(metadata.read_bytes().splitlines(), start=1):
            if line.strip():
                try:
                    name, caption = _metadata_line(line, images)
                    if name in captions and not images[name].with_suffix(".txt").is_file():
                        raise ValueError(f"{name} is listed twice")
                    captions[name] = caption
                except ValueError as error:
                    found.append(f"{METADATA} line {number}: {error}")
    else:
        found += _shared_stems(images)
    return captions, found


def _metadata_line(line: bytes, images: dict[str, Path]) -> tuple[str, str]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise ValueError('expected an object with "file_name" and "text"')
    name = PurePosixPath(row["file_name"])
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(f"file_name {row['file_name']!r} leaves the dataset folder")
    if str(name) not in images:
        raise ValueError(f"{name} is not an image in the folder")
    caption = next((row[key] for key in CAPTION_KEYS if key in row), None)
    if not isinstance(caption, str):
        raise ValueError(f"{name} has no {', '.join(CAPTION_KEYS[:-1])} or {CAPTION_KEYS[-1]}")
    return str(name), caption.strip()


def _shared_stems(images: dict[str, Path]) -> list[str]:
    by_stem: dict[str, list[str]] = defaultdict(list)
    for name, path in images.items():
        by_stem[str(PurePosixPath(name).with_suffix(""))].append(path.name)
    return [
        f"{' and '.join(names)} share one caption file, {Path(names[0]).stem}.txt: rename one"
        for names in by_stem.values()
        if len(names) > 1
    ]


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Every file that matters, with its name, in the order of names."""
    named = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    for name in sorted(named):
        hidden = any(part.startswith(".") for part in PurePosixPath(name).parts)
        if not hidden and (named[name].suffix.lower() in {*SUFFIXES, ".txt"} or name == METADATA):
            yield name, named[name]


def _listed(items: list[str], separator: str = "; ") -> str:
    more = f"{separator}and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return separator.join(items[:_SHOWN]) + more
