"""What a hollowed denoiser is told of each sample instead of computing it: see ``families.hollow``.

All of it is computed before the first step, by the bare base, sample by sample, and kept in the cache in
shards of ``SHARD``. A shard is named by the very tensors that decide it: what the denoiser is given for each
of its samples, and the denoiser's weights. Runs that are given the same share shards; an interrupted start
finds those that are done.
"""

from collections.abc import Callable, Mapping
from functools import partial

import diffusers
import torch
from torch import Tensor

from .batch import Batch, Sample, batch_of, noised
from .cache import Cache, cache_key, tensors_digest
from .config import Base
from .data import TrainingSet
from .errors import TrainerError
from .families import Conditioning, Family
from .narration import say
from .randomness import platform_fingerprint
from .texts import Texts

SHARD = 64
"""Samples of a shard, beside those that preserve the prior."""
_NOISY, _TIMESTEPS = "noisy", "timesteps"
_AT_HAND = 2
"""Shards that are kept in memory: a step's samples follow one another."""


class HiddenStates:
    """See ``Beside``. Of a family with a ``cut``."""

    def __init__(
        self,
        base: Base,
        family: Family,
        training: TrainingSet,
        texts: Texts,
        cache: Cache,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        """Compute what is not in the cache yet; ``alive`` is called after each sample.

        Args:
            family: The bare base: nothing is attached to it yet.

        Raises:
            OSError: A shard cannot be kept.
        """
        self._family = family
        self._cache = cache
        self._at_hand: dict[int, Mapping[str, Tensor]] = {}
        self._training = training
        self._keys: list[str] = []
        assert family.cut is not None
        way = {
            "unet": tensors_digest(family.denoiser.state_dict()),
            "cut": family.cut.number,
            "layout": f"{base.channels_last} {base.compile}",
            "diffusers": diffusers.__version__,
            "platform": platform_fingerprint(family.device),
        }
        say(f"computing the cut-off part of {training.distinct} samples, as far as it is not here")
        for first in range(0, training.distinct, SHARD):
            samples = training.samples(range(first, min(first + SHARD, training.distinct)))
            given = {sample.n: _given(family, texts, sample) for sample in samples}
            inputs = {f"{n} {name}": part for n, own in given.items() for name, part in own.items()}
            self._keys.append(cache_key(kind="hidden", inputs=tensors_digest(inputs), **way))
            cache.keep(self._keys[-1], partial(_computed, family, given, alive))

    def conditioning(self, batch: Batch) -> Conditioning:
        """
        Raises:
            TrainerError: A shard that was in the cache is gone, or damaged.
        """
        states = [self._states(self._training.drawn_as(n)) for n in batch.samples]
        return {
            name: torch.stack([own[name] for own in states]).to(self._family.device, non_blocking=True)
            for name in states[0]
        }

    def _states(self, n: int) -> Conditioning:
        shard = self._shard(max(n, -1 - n) // SHARD)
        return {name: part for key, part in shard.items() for own, name in [key.split()] if own == str(n)}

    def _shard(self, number: int) -> Mapping[str, Tensor]:
        if number not in self._at_hand:
            if len(self._at_hand) == _AT_HAND:
                del self._at_hand[next(iter(self._at_hand))]
            self._at_hand[number] = self._cache.through(self._keys[number], _gone)
        return self._at_hand[number]


def _given(family: Family, texts: Texts, sample: Sample) -> dict[str, Tensor]:
    """What the denoiser is given for one sample, on the CPU."""
    batch = batch_of([sample])
    conditioning = texts.conditioning(batch.captions)
    conditioning |= family.size_conditioning(batch.sizes_B6.to(family.device))
    given = {_NOISY: noised(batch, family), _TIMESTEPS: batch.timesteps_B, **conditioning}
    return {name: part.detach().cpu() for name, part in given.items()}


def _computed(
    family: Family, given: Mapping[int, Mapping[str, Tensor]], alive: Callable[[], None]
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for n, own in given.items():
        told = {name: part.to(family.device) for name, part in own.items()}
        hidden = family.hidden(told.pop(_NOISY), told.pop(_TIMESTEPS), told)
        found |= {f"{n} {name}": part[0].cpu() for name, part in hidden.items()}
        alive()
    return found


def _gone() -> dict[str, Tensor]:
    raise TrainerError(
        "what a hollowed UNet was to be told is no longer in this node's cache",
        "let it start again: what is missing is then computed",
    )
