"""What somebody wants to know of a data set before training on it, and whether it can be trained on.

A survey reads the headers of images only; ``problems`` decodes every image and every mask.
"""

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..config import Dataset
from ..config.buckets import Size, bucket_sizes, nearest
from ..errors import BadInput
from .concepts import WHOLE
from .folder import Contents, Example, contents_of, held_out
from .images import image_size, read_alpha, read_control, read_image, read_mask

ENLARGED = 2.0
"""An image that is scaled up by more than this gains nothing but blur."""
_LINES = 16
"""How many concepts, and how many buckets, are listed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """The counts of one data set, at one resolution."""

    images: int
    captions: int
    """Different ones."""
    missing: int
    """Images without a caption."""
    held_out: int
    samples: int
    """At most so many make up an epoch: images to train on, times their repeats."""
    masked: int | None
    """Images with a mask file, where masks are files."""
    enlarged: int
    """Images that are scaled up by more than ``ENLARGED``."""
    concepts: dict[str, tuple[int, int, float]]
    """By subfolder: images, repeats, weight of the loss. Empty where nothing is set by subfolder."""
    sizes: dict[Size, int]
    """Images by the size at which they are trained."""


def survey(dataset: Dataset, resolution: int, folder: Path) -> Survey:
    """Count what a folder holds. An image whose header cannot be read is in no bucket."""
    contents = contents_of(dataset, folder)
    examples = contents.examples
    sizes = bucket_sizes(dataset, resolution)
    trained: Counter[Size] = Counter()
    enlarged = 0
    for original in filter(None, map(_size, examples)):
        target = nearest(original, sizes)
        trained[target] += 1
        enlarged += max(new / old for new, old in zip(target, original, strict=True)) > ENLARGED
    return Survey(
        images=len(examples) + len(contents.missing),
        captions=len({example.caption for example in examples}),
        missing=len(contents.missing),
        held_out=held_out(len(examples), dataset.val_fraction),
        samples=most_samples(dataset, examples),
        masked=sum(example.mask is not None for example in examples) if dataset.masks == "files" else None,
        enlarged=enlarged,
        concepts=_concepts(contents),
        sizes=dict(trained.most_common()),
    )


def most_samples(dataset: Dataset, examples: Sequence[Example]) -> int:
    """Return how many samples an epoch has at most: which images are held out is decided later."""
    kept = held_out(len(examples), dataset.val_fraction)
    return sum(sorted(example.repeats for example in examples)[kept:])


def lines(name: str, found: Survey) -> list[str]:
    """Return a survey for a person to read, the whole in the first line.

    Args:
        name: What the data set is called.
    """
    head = (
        f"dataset {name}: {_count(found.images, 'image')}, {_count(found.captions, 'caption')}, "
        f"{found.missing} missing; {found.held_out} held out, {_count(found.samples, 'sample')} an epoch"
    )
    if found.masked is not None:
        head += f"; {_count(found.masked, 'mask')}"
    if found.enlarged:
        head += f"; {found.enlarged} enlarged more than {ENLARGED:g} times"
    concepts = [
        f"  concept {name}: {_count(images, 'image')} × {repeats}"
        + (f", loss × {weight:g}" if weight != 1 else "")
        for name, (images, repeats, weight) in found.concepts.items()
    ]
    sizes = [
        f"  {width}×{height}: {_count(images, 'image')}" for (height, width), images in found.sizes.items()
    ]
    return [head, *_shortened(concepts), *(_shortened(sizes) if len(sizes) > 1 else [])]


def problems(dataset: Dataset, folder: Path | None = None) -> list[str]:
    """Say everything that is wrong with a dataset, decoding every image. Empty: it can be trained on.

    Args:
        folder: Where it lies on this machine; by default, at its path.
    """
    contents = contents_of(dataset, folder or Path(dataset.path).expanduser())
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding lets other threads run
        wrong = pool.map(lambda example: _undecodable(dataset, example), contents.examples)
        return [*contents.problems, *(text for text in wrong if text)]


def _undecodable(dataset: Dataset, example: Example) -> str | None:
    try:
        image = read_image(example.path)
        if dataset.masks == "alpha":
            read_alpha(example.path)
        if example.mask:
            read_mask(example.mask, image.size)
        if example.control:
            read_control(example.control, image.size)
    except BadInput as error:
        return str(error)
    return None


def _size(example: Example) -> Size | None:
    try:
        return image_size(example.path)
    except BadInput:
        return None


def _concepts(contents: Contents) -> dict[str, tuple[int, int, float]]:
    found: dict[str, tuple[int, int, float]] = {}
    for example in contents.examples:
        images, _, _ = found.get(example.concept, (0, 0, 0.0))
        found[example.concept] = (images + 1, example.repeats, example.loss_weight)
    return {} if list(found) == [WHOLE] and found[WHOLE][1:] == (1, 1.0) else found


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _shortened(rows: list[str]) -> list[str]:
    more = len(rows) - _LINES
    return [*rows[:_LINES], f"  and {more} more"] if more > 0 else rows
