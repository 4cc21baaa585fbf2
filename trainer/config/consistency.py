"""Settings of one run that contradict each other, whatever the model and the data are.

Each text says why, and the nearest thing that works. What depends on the model or on the images is found at
preflight, or by the trainer before its first step.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .buckets import bucket_sizes

if TYPE_CHECKING:
    from . import RunSpec


def contradictions(spec: "RunSpec") -> list[str]:
    """Return what cannot work together in a spec without a ``command``; empty: nothing."""
    return [*_texts(spec), *_buckets(spec)]


def _texts(spec: "RunSpec") -> Iterator[str]:
    dataset = spec.dataset
    if dataset.cache_text is True and spec.base.train_text_encoder:
        yield (
            "dataset.cache_text encodes captions once, but base.train_text_encoder changes what they say: "
            "leave cache_text at auto, or set train_text_encoder to false"
        )
    if dataset.cache_text is True and dataset.varied_captions:
        key = "shuffle_caption" if dataset.shuffle_caption else "tag_dropout"
        yield (
            f"dataset.cache_text encodes each caption once, but dataset.{key} makes another one for each "
            "sample: leave cache_text at auto, or leave the captions as they are"
        )


def _buckets(spec: "RunSpec") -> Iterator[str]:
    dataset, resolution = spec.dataset, spec.base.resolution
    if not dataset.buckets:
        return
    if dataset.bucket_min > dataset.bucket_max:
        yield (
            f"dataset.bucket_min ({dataset.bucket_min}) is above dataset.bucket_max ({dataset.bucket_max}): "
            "exchange them"
        )
    elif not bucket_sizes(dataset, resolution):
        step = min(dataset.bucket_step, resolution)
        yield (
            f"no bucket has sides of {dataset.bucket_min} to {dataset.bucket_max} pixels in steps of "
            f"{dataset.bucket_step} and at most the area of base.resolution {resolution}: set "
            f"dataset.bucket_min to {step * max(1, resolution // (2 * step))} or less, bucket_max to "
            f"{resolution} or more, and bucket_step to {step} or less"
        )
