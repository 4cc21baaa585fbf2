"""What the denoiser is told of captions and prompts: looked up, or encoded anew each time.

Looked up where a caption always says the same: text encoders are frozen, and captions are not put together
anew for each sample. Encoded anew otherwise; gradients then flow into what is trained of the text encoders.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .config import RunSpec
from .families import Conditioning, Family


def is_cached(spec: RunSpec) -> bool:
    """Whether each text of a run is encoded once, before training; else each time it is needed."""
    if spec.dataset.cache_text != "auto":
        return spec.dataset.cache_text
    words = "textual_inversion" in spec.base.train
    return not (spec.dataset.varied_captions or spec.base.train_text_encoder or words)


class Texts(Protocol):
    """The source of text conditioning of one run."""

    def conditioning(self, captions: Sequence[str]) -> Conditioning:
        """Return what the captions say, batched, on the family's device."""


class CachedTexts:
    """Every text was encoded beforehand."""

    def __init__(self, states: Mapping[str, Mapping[str, Tensor]], device: torch.device) -> None:
        """``states`` maps each text to its conditioning, without a batch axis, on the CPU."""
        self._states = states
        self._device = device

    def conditioning(self, captions: Sequence[str]) -> Conditioning:
        entries = [self._states[caption] for caption in captions]
        return {
            name: torch.stack([entry[name] for entry in entries]).to(self._device, non_blocking=True)
            for name in entries[0]
        }


class LiveTexts:
    """Texts are encoded when they are needed, by the text encoders as they then are."""

    def __init__(self, family: Family) -> None:
        self._family = family

    def conditioning(self, captions: Sequence[str]) -> Conditioning:
        family = self._family
        return family.encode_tokens([family.token_ids(caption) for caption in captions])
