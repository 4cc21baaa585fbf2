"""The exponential moving average of the trained parameters, which becomes the result.

After optimizer step ``n``, counted from 1: ``average ← d·average + (1 − d)·parameter`` with
``d = min(ema_decay, n / (9 + n))``, and ``d = 0`` at the first step. That is ``EMAModel`` of diffusers as its
training scripts use it: a short run is averaged over its later steps, and what was drawn at initialisation
leaves no trace. The decay depends on the step only, so nothing but the tensors is saved.

What is trained from a later step on is averaged from there: its ``n`` counts from there. What rests has no
gradient, and is its own average: what was trained on top of it saw it as it is.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """The moving averages of named parameters, fp32, where the parameters are."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], decay: float, begins: Mapping[str, int] | None = None
    ) -> None:
        """``begins``: the step, counted from 0, from which a parameter is trained; by default the first."""
        from diffusers.training_utils import EMAModel

        self._parameters = dict(parameters)
        by_start: dict[int, dict[str, nn.Parameter]] = {}
        for name, parameter in self._parameters.items():
            by_start.setdefault(begins[name] if begins else 0, {})[name] = parameter
        self._models = [
            (start, own, EMAModel(own.values(), decay=decay, foreach=True)) for start, own in by_start.items()
        ]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By the parameters' names, in their order; they change with the next step."""
        pairs = [zip(own, model.shadow_params, strict=True) for _, own, model in self._models]
        found = {name: tensor for those in pairs for name, tensor in those}
        return {name: found[name] for name in self._parameters}

    def updated(self, step: int) -> None:
        """Take in the parameters as optimizer step ``step``, counted from 1, left them."""
        for start, own, model in self._models:
            if step <= start or not any(parameter.requires_grad for parameter in own.values()):
                for average, parameter in zip(model.shadow_params, own.values(), strict=True):
                    average.copy_(parameter.data)
                continue
            model.optimization_step = step - start - 1
            model.step(own.values())

    @contextmanager
    def used(self) -> Iterator[None]:
        """Within, the parameters have the values of their averages."""
        kept = [parameter.detach().clone() for parameter in self._parameters.values()]
        for _, own, model in self._models:
            model.copy_to(own.values())
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
        for _, own, model in self._models:
            model.shadow_params = [parameter.detach().clone() for parameter in own.values()]
        for name, parameter in self._parameters.items():
            parameter.data.copy_(raw[name])
        return None
