"""In which order an epoch visits its images.

Each epoch visits every slot once: nothing is skipped, repeated or dropped at its end. Where images have
several shapes, those of a step are of one shape as far as that goes: a step of several shapes takes several
forward passes.
"""

from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import TypeVar

import torch

from .randomness import generator

T = TypeVar("T")


class Epochs:
    """Which slot each sample of a run is: a pure function of the sample's global index."""

    def __init__(self, shapes: Sequence[Hashable], seed: int, together: int) -> None:
        """
        Args:
            shapes: Of each slot.
            together: Samples of a step, which begins at each multiple of it, also in the middle of an epoch.
        """
        self._shapes, self._seed, self._together = tuple(shapes), seed, together
        self._order = lru_cache(maxsize=2)(self._ordered)

    def slot(self, n: int) -> int:
        """Return the slot of sample ``n``."""
        epoch, position = divmod(n, len(self._shapes))
        return self._order(epoch)[position]

    def _ordered(self, epoch: int) -> list[int]:
        return order(self._shapes, self._seed, epoch, self._together)


def order(shapes: Sequence[Hashable], seed: int, epoch: int, together: int) -> list[int]:
    """Return the slots of an epoch in the order in which they are visited: see ``Epochs``."""
    count = len(shapes)
    shuffled = _shuffled(list(range(count)), seed, "order", epoch)
    by_shape: dict[Hashable, list[int]] = {}
    for slot in shuffled:
        by_shape.setdefault(shapes[slot], []).append(slot)
    if len(by_shape) == 1:
        return shuffled
    first = min(-epoch * count % together, count)  # what is left of the step that began in the last epoch
    whole, last = divmod(count - first, together)
    steps, rest = [], []
    for alike in by_shape.values():
        full = len(alike) - len(alike) % together
        steps += _cut(alike[:full], together)
        rest += alike[full:]
    while len(steps) > whole:  # the parts of a step at both ends take one to pieces
        rest += steps.pop()
    steps += _cut(rest[first : len(rest) - last], together)
    inner = [slot for step in _shuffled(steps, seed, "steps", epoch) for slot in step]
    return [*rest[:first], *inner, *rest[len(rest) - last :]]


def _cut(slots: list[int], size: int) -> list[list[int]]:
    return [slots[start : start + size] for start in range(0, len(slots), size)]


def _shuffled(items: list[T], seed: int, purpose: str, n: int) -> list[T]:
    return [items[i] for i in torch.randperm(len(items), generator=generator(seed, purpose, n)).tolist()]
