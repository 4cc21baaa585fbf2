"""One optimizer step: losses, gradients, clipping, the optimizer's move, the moving average.

The step's samples, and so the sum of their gradients, do not depend on how they are divided into forward
passes and among processes; the last bits of the sum do. Knows neither the family nor the method, writes
nothing, and takes no notice of the clock unless it was asked to stop.
"""

import math
import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from storage.records import EndReason

from .batch import Batch, noised
from .beside import Beside
from .errors import Diverged
from .evidence import ADVICE
from .families import Family
from .methods import Methods
from .objective import Objective
from .optim import learning_rate, set_learning_rate
from .parts import Parts
from .randomness import seed_layers
from .snapshot import Progress
from .stop import Stopped
from .texts import Texts

LOWER_RATE = ADVICE[EndReason.NAN_LOSS]

REST_SHARE = 0.5
"""A stopped step is finished if it takes no more than this share of the time left: saving takes some."""


def follow(parts: Parts, progress: Progress) -> None:
    """Take the rest of a run's steps beside the process that leads."""
    in_training(parts.family, parts.methods)
    stepper = Stepper(parts, progress.scaler)
    for step in range(progress.step, parts.spec.base.max_train_steps):
        stepper.take(step)


def in_training(family: Family, methods: Methods) -> None:
    """Let what this run trains behave as in training: dropout, gradients computed from checkpoints."""
    methods.use()
    for network in (family.denoiser, *family.text_encoders.values()):
        network.train(any(parameter.requires_grad for parameter in network.parameters()))


def summed_loss(
    batch: Batch, *, family: Family, methods: Methods, objective: Objective, texts: Texts, beside: Beside
) -> Tensor:
    """Return the weighted sum of a batch's losses, a scalar."""
    x0, noise, timesteps, sizes, weights = (
        part.to(family.device, non_blocking=True)
        for part in (batch.x0_BCHW, batch.noise_BCHW, batch.timesteps_B, batch.sizes_B6, batch.weights_B)
    )
    mask = None if batch.mask_B1HW is None else batch.mask_B1HW.to(family.device, non_blocking=True)
    noisy, besides = noised(batch, family), beside.conditioning(batch)

    def predicted() -> Tensor:
        conditioning = texts.conditioning(batch.captions) | family.size_conditioning(sizes)
        return family.predict(noisy, timesteps, conditioning | besides)

    if batch.from_base:
        with torch.no_grad(), methods.aside():  # text encoders too
            target = predicted()
    else:
        target = family.process.target(x0, noise, timesteps)
    losses_B = objective.losses(predicted(), target, timesteps, mask)
    return (weights * losses_B).sum()


class Stepper:
    """Takes a run's steps, one by one."""

    def __init__(self, parts: Parts, scaler_state: Mapping[str, int | float] | None) -> None:
        self._parts = parts
        self._base = parts.spec.base
        self._trained: list[nn.Parameter] = []
        fp16 = self._base.mixed_precision == "fp16"
        self._scaler = torch.amp.GradScaler(parts.family.device.type, enabled=fp16)
        if scaler_state:
            self._scaler.load_state_dict(dict(scaler_state))

    @property
    def scaler_state(self) -> dict[str, int | float] | None:
        """State of the fp16 gradient scaler."""
        return self._scaler.state_dict() or None

    def take(self, step: int) -> tuple[float, float]:
        """Take step ``step``, counted from 0. Returns the mean loss of its samples and the learning rate.

        Raises:
            Stopped: There is no time for the rest of the step. Nothing that is saved has changed.
            Diverged: The loss or its gradient is not finite. Nothing that is saved has changed.
        """
        self._trained = self._parts.methods.at(step)
        set_learning_rate(self._parts.optimizer, rate := learning_rate(self._base, step))
        mean_loss = self._accumulate(step)
        self._update(mean_loss, step, rate)
        if self._parts.average:
            self._parts.average.updated(step + 1)
        return mean_loss, rate

    def _accumulate(self, step: int) -> float:
        """Add up the gradients of one step's samples, of all processes, and return their mean loss."""
        began, parts = time.monotonic(), self._parts
        total = torch.zeros((), device=parts.family.device)
        batches = parts.ranks.share(parts.training.batches(step, self._largest))
        parts.methods.use()
        for done, batch in enumerate(batches):
            parts.stop.alive()
            if done and self._is_too_long((time.monotonic() - began) / done * (len(batches) - done)):
                raise Stopped
            seed_layers(self._base.seed, "dropout", batch.samples[0])
            share = self._loss(batch) / self._base.samples_per_step
            self._scaler.scale(share).backward()  # type: ignore[no-untyped-call]
            total += share.detach()
        for parameter in self._trained:
            if parameter.grad is None:  # of a layer that nothing needed; it has optimizer state all the same
                parameter.grad = torch.zeros_like(parameter)
        return float(parts.ranks.summed(self._trained, total))

    @property
    def _largest(self) -> int:
        """Images of one forward pass."""
        wanted = self._parts.options.micro_batch or self._base.train_batch_size
        return min(wanted, math.ceil(self._base.samples_per_step / self._parts.ranks.count))

    def _is_too_long(self, rest_s: float) -> bool:
        """Whether a stop was asked for that leaves too little time for the rest of a step."""
        stop = self._parts.stop
        left_s = stop.left_s() if stop.requested else None
        return left_s is not None and rest_s > REST_SHARE * left_s

    def _loss(self, batch: Batch) -> Tensor:
        parts = self._parts
        return summed_loss(
            batch,
            family=parts.family,
            methods=parts.methods,
            objective=parts.objective,
            texts=parts.texts,
            beside=parts.beside,
        )

    def _update(self, mean_loss: float, step: int, rate: float) -> None:
        """Clip the gradient and let the optimizer move, unless that would put NaN into what is trained."""
        optimizer = self._parts.optimizer
        self._scaler.unscale_(optimizer)
        limit = math.inf if self._base.max_grad_norm is None else self._base.max_grad_norm
        norm = float(torch.nn.utils.clip_grad_norm_(self._trained, limit))
        overflow = self._scaler.is_enabled() and not math.isfinite(norm)  # fp16: the scaler skips this step
        if not math.isfinite(mean_loss) or not (math.isfinite(norm) or overflow):
            raise Diverged(
                f"step {step + 1}: loss {mean_loss}, gradient norm {norm}",
                LOWER_RATE,
            )
        self._scaler.step(optimizer)
        self._scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if not overflow:
            self._parts.methods.updated(rate)
