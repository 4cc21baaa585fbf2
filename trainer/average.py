"""The exponential moving average of the trained parameters, which becomes the result.

After optimizer step ``n``, counted from 1: ``average ← d·average + (1 − d)·parameter`` with
``d = min(ema_decay, n / (9 + n))``, and ``d = 0`` at the first step. That is ``EMAModel`` of diffusers as its
training scripts use it: a short run is averaged over its later steps, and what was drawn at initialisation
leaves no trace. The decay depends on the step only, so nothing but the tensors is saved.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """The moving averages of named parameters, fp32, where the parameters are."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        from diffusers.training_utils import EMAModel

        self._parameters = dict(parameters)
        self._model = EMAModel(self._parameters.values(), decay=decay, foreach=True)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By the parameters' names; they change with the next step."""
        return dict(zip(self._parameters, self._model.shadow_params, strict=True))

    def updated(self, step: int) -> None:
        """Take in the parameters as optimizer step ``step``, counted from 1, left them."""
        self._model.optimization_step = step - 1
        self._model.step(self._parameters.values())

    @contextmanager
    def used(self) -> Iterator[None]:
        """Within, the parameters have the values of their averages."""
        kept = [parameter.detach().clone() for parameter in self._parameters.values()]
        self._model.copy_to(self._parameters.values())
        try:
            yield
        finally:
            for parameter, value in zip(self._parameters.values(), kept, strict=True):
                parameter.data.copy_(value)

    def restored(self, raw: Mapping[str, Tensor]) -> str | None:
        """Go on from a checkpoint: the parameters hold the averages, and ``raw`` is what they have to be.

        Says what does not fit and changes nothing, or returns None.
        """
        if raw.keys() != self._parameters.keys():
            odd = sorted(raw.keys() ^ self._parameters.keys())
            return f"the trained values beside the averages are missing or unknown, e.g. {odd[0]}"
        for name, parameter in self._parameters.items():
            if raw[name].shape != parameter.shape or not torch.isfinite(raw[name]).all():
                return f"{name}: not the trained values beside its average"
        self._model.shadow_params = [p.detach().clone() for p in self._parameters.values()]
        for name, parameter in self._parameters.items():
            parameter.data.copy_(raw[name])
        return None
