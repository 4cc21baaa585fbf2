"""Which sizes images are trained at: one square, or aspect-ratio buckets (SDXL paper, appendix I).

A bucket has sides that are multiples of ``bucket_step`` between ``bucket_min`` and ``bucket_max``, and at
most the area of the square of the resolution: for each width the greatest such height, and the other way
round. Every step then needs about the same memory.
"""

import math
from collections.abc import Collection
from functools import lru_cache

from .dataset import Dataset

Size = tuple[int, int]
"""Height and width in pixels."""


def bucket_sizes(dataset: Dataset, resolution: int) -> tuple[Size, ...]:
    """Return the sizes that a dataset's images are trained at, sorted; the one square without buckets.

    Empty: the bounds fit nothing.
    """
    if not dataset.buckets:
        return ((resolution, resolution),)
    return _sizes(resolution, dataset.bucket_min, dataset.bucket_max, dataset.bucket_step)


def nearest(size: Size, sizes: Collection[Size]) -> Size:
    """Return the size whose aspect ratio is nearest to that of ``size`` as a factor; the largest of such."""

    def distance(other: Size) -> tuple[float, int, Size]:
        ratio = math.log((other[1] * size[0]) / (other[0] * size[1]))
        return (round(abs(ratio), 9), -other[0] * other[1], other)

    return min(sizes, key=distance)


@lru_cache(maxsize=8)
def _sizes(resolution: int, least: int, most: int, step: int) -> tuple[Size, ...]:
    found = set()
    for side in range(-(-least // step) * step, most + 1, step):
        other = min(resolution**2 // side, most) // step * step
        if other >= least:
            found |= {(side, other), (other, side)}
    return tuple(sorted(found))
