"""What a sample brings to a forward pass, and samples of one shape together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .families import Family


@dataclass(frozen=True, slots=True)
class Sample:
    """What one sample brings to a forward pass, on the CPU."""

    n: int
    """Its global index; of what is trained on beside sample ``n`` for prior preservation, ``-1 - n``."""
    x0_CHW: Tensor
    noise_CHW: Tensor
    timestep: Tensor
    caption: str
    size_6: Tensor
    """See ``Family.size_conditioning``."""
    weight: float
    """Of its loss in the sum over the step, before division by the images of a step."""
    mask_1HW: Tensor | None = None
    seen_noise_CHW: Tensor | None = None
    """The noise in what the model sees, if that is another than it should predict."""
    control_3HW: Tensor | None = None
    """See ``Family.control_conditioning``."""
    from_base: bool = False
    """The base's own prediction is the target, instead of the process's."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward pass sees: samples of one shape."""

    samples: tuple[int, ...]
    """Their global indices."""
    x0_BCHW: Tensor
    noise_BCHW: Tensor
    timesteps_B: Tensor
    captions: tuple[str, ...]
    sizes_B6: Tensor
    weights_B: Tensor
    mask_B1HW: Tensor | None
    seen_noise_BCHW: Tensor | None
    control_B3HW: Tensor | None
    from_base: bool


def shape_of(sample: Sample) -> tuple[int, ...]:
    """Return what samples of one forward pass have alike."""
    beside = (sample.mask_1HW is not None, sample.control_3HW is not None)
    return (*sample.x0_CHW.shape, *beside, sample.from_base)


def noised(batch: Batch, family: Family) -> Tensor:
    """Return what the denoiser sees of a batch, on the family's device."""
    seen = batch.noise_BCHW if batch.seen_noise_BCHW is None else batch.seen_noise_BCHW
    x0, noise, timesteps = (
        part.to(family.device, non_blocking=True) for part in (batch.x0_BCHW, seen, batch.timesteps_B)
    )
    return family.process.add_noise(x0, noise, timesteps)


def batch_of(samples: Sequence[Sample]) -> Batch:
    """Return samples of one shape as what one forward pass sees."""

    def stacked(part: Callable[[Sample], Tensor]) -> Tensor:
        return torch.stack([part(sample) for sample in samples])

    masks = [sample.mask_1HW for sample in samples if sample.mask_1HW is not None]
    seen = [sample.seen_noise_CHW for sample in samples if sample.seen_noise_CHW is not None]
    controls = [sample.control_3HW for sample in samples if sample.control_3HW is not None]
    return Batch(
        samples=tuple(sample.n for sample in samples),
        x0_BCHW=stacked(lambda sample: sample.x0_CHW),
        noise_BCHW=stacked(lambda sample: sample.noise_CHW),
        timesteps_B=stacked(lambda sample: sample.timestep),
        captions=tuple(sample.caption for sample in samples),
        sizes_B6=stacked(lambda sample: sample.size_6),
        weights_B=torch.tensor([sample.weight for sample in samples]),
        mask_B1HW=torch.stack(masks) if masks else None,
        seen_noise_BCHW=torch.stack(seen) if seen else None,
        control_B3HW=torch.stack(controls) if controls else None,
        from_base=samples[0].from_base,
    )
