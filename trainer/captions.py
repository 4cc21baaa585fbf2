"""What a sample is told of its image: the caption, with its tags in another order, some of them, or nothing.

A pure function of the seed and the sample's global index, as everything else of a sample.
"""

import torch

from .config import Dataset
from .randomness import generator


def caption_of(dataset: Dataset, caption: str, seed: int, n: int) -> str:
    """Return the caption of sample ``n``, whose image has ``caption``.

    A caption is tags between ``caption_separator``. The first ``keep_tokens`` of them are neither moved nor
    left out; of the others each is left out with probability ``tag_dropout``, and with ``shuffle_caption``
    the rest is put into another order. With probability ``caption_dropout`` all of it is left out.
    """
    if float(torch.rand((), generator=generator(seed, "caption", n))) < dataset.caption_dropout:
        return ""
    if not dataset.varied_captions:
        return caption
    separator = dataset.caption_separator
    tags = [tag.strip() for tag in caption.split(separator) if tag.strip()]
    kept, loose = tags[: dataset.keep_tokens], tags[dataset.keep_tokens :]
    if dataset.tag_dropout:
        chances = torch.rand(len(loose), generator=generator(seed, "tags", n)).tolist()
        loose = [tag for tag, chance in zip(loose, chances, strict=True) if chance >= dataset.tag_dropout]
    if dataset.shuffle_caption:
        order = torch.randperm(len(loose), generator=generator(seed, "tag order", n)).tolist()
        loose = [loose[index] for index in order]
    return (separator if separator.isspace() else f"{separator.strip()} ").join([*kept, *loose])
