"""What the n-th sample of a run is: which image, crop, caption, posterior sample, noise and timestep.

A pure function of the seed and ``n``, the global index of the sample: step ``s`` sees the samples from
``s * samples_per_step`` on, whoever computes it, in however many forward passes, and however often it was
interrupted before. Images were encoded beforehand; no pixel is touched here.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from .batch import Batch, Sample, batch_of, shape_of
from .captions import caption_of
from .config import Base, Dataset, Prior
from .epochs import Epochs
from .families import Posterior
from .objective.noise import sample_noise, seen_noise
from .objective.process import Process
from .randomness import generator

SPLIT_SEED = 0
"""Validation images do not depend on the run's seed: all runs of a sweep hold out the same ones."""


@dataclass(frozen=True, slots=True)
class View:
    """One way in which an image is seen: as it is, or mirrored."""

    posterior: Posterior
    offset: tuple[int, int] = (0, 0)
    """How many pixels of the scaled (and mirrored) image were cut off above and left of it."""
    mask_1HW: Tensor | None = None
    """What each latent counts, in [0, 1]."""
    control_3HW: Tensor | None = None
    """What a ControlNet sees, in pixels, as bytes."""


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """One image, encoded."""

    name: str
    caption: str
    views: tuple[View, ...]
    original: tuple[int, int]
    """Height and width in pixels, as the file has them."""
    shape: tuple[int, int]
    """Height and width of its samples, in latents; a view may be larger."""
    repeats: int = 1
    """How often it comes in an epoch."""
    loss_weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Draw:
    """The choices made for one sample."""

    view: int
    top: float
    """Where the crop lies in the free room above and below, in [0, 1)."""
    left: float


def draw(n: int, *, views: int, seed: int) -> Draw:
    """Return in which way sample ``n`` sees its image, which has so many views."""
    top, left = torch.rand(2, generator=generator(seed, "crop", n)).tolist()
    return Draw(
        view=int(torch.randint(views, (), generator=generator(seed, "flip", n))),
        top=top,
        left=left,
    )


def split(count: int, held_out: int) -> tuple[list[int], list[int]]:
    """Return the indices of (training, validation) images, each in ascending order."""
    order = torch.randperm(count, generator=generator(SPLIT_SEED, "validation split", 0)).tolist()
    return sorted(order[held_out:]), sorted(order[:held_out])


class TrainingSet:
    """The samples of a run."""

    def __init__(
        self,
        images: Sequence[EncodedImage],
        base: Base,
        dataset: Dataset,
        process: Process,
        *,
        latent_pixels: int,
        prior: Prior | None = None,
        class_images: "TrainingSet | None" = None,
    ) -> None:
        """
        Args:
            prior: Beside each sample of an image comes one that preserves the prior.
            class_images: What that one is drawn from; for an online prior it is the image's own sample, with
                the class's name as its caption, and the base's prediction as its target.
        """
        self._images = images
        self._slots = [index for index, image in enumerate(images) for _ in range(image.repeats)]
        shapes = [images[index].shape for index in self._slots]
        self._epochs = Epochs(shapes, base.seed, base.samples_per_step)
        self._base = base
        self._dataset = dataset
        self._process = process
        self._latent_pixels = latent_pixels
        self._prior = prior
        self._class_images = class_images

    def batches(self, step: int, largest: int) -> list[Batch]:
        """Return the samples of an optimizer step, in forward passes of at most ``largest`` of one shape."""
        count = self._base.samples_per_step
        samples = self.samples(range(step * count, (step + 1) * count))
        samples.sort(key=shape_of)  # stable: within a shape they stay in order
        return [
            batch_of(alike[first : first + largest])
            for _, group in groupby(samples, shape_of)
            for alike in [list(group)]
            for first in range(0, len(alike), largest)
        ]

    def samples(self, numbers: Iterable[int]) -> list[Sample]:
        """Return samples by their global indices, then those that preserve the prior beside them."""
        samples = [self._sample(n) for n in numbers]
        if self._prior:
            samples += [self._preserving(self._prior, sample) for sample in samples]
        return samples

    @property
    def distinct(self) -> int:
        """So many samples of the run differ: with ``hollow`` it goes through the same ones again."""
        base = self._base
        of_run = base.max_train_steps * base.samples_per_step
        return of_run if base.hollow is None else min(base.hollow_pool, of_run)

    def drawn_as(self, n: int) -> int:
        """Return the index of the first sample that is like sample ``n``."""
        if self._base.hollow is None:
            return n
        return n % self.distinct if n >= 0 else -1 - (-1 - n) % self.distinct

    def _sample(self, number: int) -> Sample:
        seed, n = self._base.seed, self.drawn_as(number)

        def draws(purpose: str) -> torch.Generator:
            return generator(seed, purpose, n)

        image = self._images[self._slots[self._epochs.slot(n)]]
        choice = draw(n, views=len(image.views), seed=seed)
        view, shape = image.views[choice.view], image.shape
        corner = crop_corner(view.posterior.mean_CHW, shape, choice.top, choice.left)
        mean, std = (crop(part, shape, corner) for part in view.posterior)
        x0 = mean + std * torch.randn(mean.shape, generator=draws("posterior"))
        return Sample(
            n=number,
            x0_CHW=x0,
            noise_CHW=(noise := sample_noise(self._base, x0, draws)),
            timestep=self._timestep(n),
            caption=caption_of(self._dataset, image.caption, seed, n),
            size_6=sizes(image, view, corner, shape, self._latent_pixels),
            weight=image.loss_weight,
            mask_1HW=None if view.mask_1HW is None else crop(view.mask_1HW, shape, corner),
            seen_noise_CHW=seen_noise(self._base, noise, draws),
            control_3HW=controlled(view, shape, corner, self._latent_pixels),
        )

    def _preserving(self, prior: Prior, sample: Sample) -> Sample:
        """Return what is trained on beside a sample, so that the class stays what it is to the base."""
        n = -1 - sample.n
        if self._class_images:
            return replace(self._class_images._sample(n), weight=prior.weight)
        caption = prior.prompts[self.drawn_as(sample.n) % len(prior.prompts)]
        return replace(sample, n=n, caption=caption, weight=prior.weight, mask_1HW=None, from_base=True)

    def _timestep(self, n: int) -> Tensor:
        base = self._base
        end = base.max_timestep or self._process.levels
        drawn = generator(base.seed, "timestep", n)
        return self._process.draw_timestep(drawn, base.min_timestep, end, base.timestep_sampling)


def sizes(
    image: EncodedImage, view: View, corner: tuple[int, int], shape: tuple[int, int], latent_pixels: int
) -> Tensor:
    """Return what ``Family.size_conditioning`` is given of a crop of an image's latents."""
    top, left = (off + at * latent_pixels for off, at in zip(view.offset, corner, strict=True))
    height, width = (side * latent_pixels for side in shape)
    return torch.tensor([*image.original, top, left, height, width], dtype=torch.float32)


def crop_corner(latents_CHW: Tensor, shape: tuple[int, int], top: float, left: float) -> tuple[int, int]:
    """Return the upper left corner of a crop; ``top`` and ``left`` say where in the free room, in [0, 1)."""
    height, width = latents_CHW.shape[-2:]
    return int(top * (height - shape[0] + 1)), int(left * (width - shape[1] + 1))


def crop(latents_CHW: Tensor, shape: tuple[int, int], corner: tuple[int, int]) -> Tensor:
    """Cut ``shape`` (height, width) out of latents at an upper left corner."""
    (height, width), (y, x) = shape, corner
    return latents_CHW[..., y : y + height, x : x + width]


def controlled(
    view: View, shape: tuple[int, int], corner: tuple[int, int], latent_pixels: int
) -> Tensor | None:
    """Return what a ControlNet sees of a crop of a view's latents."""
    if view.control_3HW is None:
        return None
    (height, width), (y, x) = ((side * latent_pixels for side in sides) for sides in (shape, corner))
    return crop(view.control_3HW, (height, width), (y, x))
