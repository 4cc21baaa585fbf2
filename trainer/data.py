"""What the n-th sample of a run is: which image, crop, caption, posterior sample, noise and timestep.

A pure function of the seed and ``n``, the global index of the sample: step ``s`` sees the samples from
``s * samples_per_step`` on, whoever computes it and however often it was interrupted before. Images and
captions were encoded beforehand; no pixel is touched here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .config import Dataset
from .families import Posterior
from .randomness import generator

SPLIT_SEED = 0
"""Validation images do not depend on the run's seed: all runs of a sweep hold out the same ones."""


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """One image, encoded: as it is, and mirrored if the dataset asks for flips."""

    name: str
    caption: str
    views: tuple[Posterior, ...]


@dataclass(frozen=True, slots=True)
class Draw:
    """The choices made for one sample."""

    image: int
    view: int
    top: float
    """Where the crop lies in the free room above and below, in [0, 1)."""
    left: float
    drop_caption: bool


class Batch(NamedTuple):
    """What one forward pass sees, on the CPU."""

    x0_BCHW: Tensor
    noise_BCHW: Tensor
    timesteps_B: Tensor
    text_BLD: Tensor


def draw(n: int, *, images: int, views: int, caption_dropout: float, seed: int) -> Draw:
    """Return the choices for sample ``n``. Each epoch visits every image once, in an order of its own."""
    top, left = torch.rand(2, generator=generator(seed, "crop", n)).tolist()
    return Draw(
        image=_order(seed, n // images, images)[n % images],
        view=int(torch.randint(views, (), generator=generator(seed, "flip", n))),
        top=top,
        left=left,
        drop_caption=float(torch.rand((), generator=generator(seed, "caption", n))) < caption_dropout,
    )


def split(count: int, held_out: int) -> tuple[list[int], list[int]]:
    """Return the indices of (training, validation) images, each in ascending order."""
    order = torch.randperm(count, generator=generator(SPLIT_SEED, "validation split", 0)).tolist()
    return sorted(order[held_out:]), sorted(order[:held_out])


class TrainingSet:
    """The samples of a run."""

    def __init__(
        self,
        images: list[EncodedImage],
        text: Mapping[str, Tensor],
        dataset: Dataset,
        *,
        side: int,
        timesteps: int,
        seed: int,
    ) -> None:
        """``text`` maps every caption, and the empty one, to its states (L, D); ``side`` is in latents."""
        self._images = images
        self._text = text
        self._caption_dropout = dataset.caption_dropout
        self._side = side
        self._timesteps = timesteps
        self._seed = seed

    def batch(self, first: int, size: int) -> Batch:
        """Return the samples ``first`` to ``first + size - 1``."""
        samples = [self._sample(n) for n in range(first, first + size)]
        return Batch(*(torch.stack(parts) for parts in zip(*samples, strict=True)))

    def _sample(self, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        choice = draw(
            n,
            images=len(self._images),
            views=len(self._images[0].views),
            caption_dropout=self._caption_dropout,
            seed=self._seed,
        )
        image = self._images[choice.image]
        mean, std = (crop(part, self._side, choice.top, choice.left) for part in image.views[choice.view])
        x0 = mean + std * torch.randn(mean.shape, generator=generator(self._seed, "posterior", n))
        noise = torch.randn(x0.shape, generator=generator(self._seed, "noise", n))
        timestep = torch.randint(self._timesteps, (), generator=generator(self._seed, "timestep", n))
        return x0, noise, timestep, self._text["" if choice.drop_caption else image.caption]


def crop(latents_CHW: Tensor, side: int, top: float, left: float) -> Tensor:
    """Cut a square out of latents; ``top`` and ``left`` say where in the free room, in [0, 1)."""
    height, width = latents_CHW.shape[-2:]
    y, x = int(top * (height - side + 1)), int(left * (width - side + 1))
    return latents_CHW[..., y : y + side, x : x + side]


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    order: list[int] = torch.randperm(count, generator=generator(seed, "order", epoch)).tolist()
    return order
