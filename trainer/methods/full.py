"""Full fine-tuning: all weights of the denoiser are trained, and of the CLIP text encoders if asked for.

They are fp32 whatever precision the networks compute in (autocast), and there is no second copy of the base:
what is trained is the base, which therefore belongs to one run only and cannot stand aside.
"""

from collections.abc import Mapping

from torch import nn

from ..config import Base
from ..errors import BadInput
from ..families import Family
from .targets import text_encoder_rate, trained_text_encoders

METHOD = "full"
"""Of the header of a checkpoint's file, under ``method``."""


class Whole:
    """All weights of one network. See ``Method``."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], rate: float = 1.0) -> None:
        self.parameters = dict(sorted(parameters.items()))
        self.rate = rate

    def metadata(self) -> dict[str, str]:
        return {"format": "pt", "method": METHOD}

    def use(self) -> None:
        pass

    def stand_aside(self) -> None:
        raise BadInput("the base's own weights are what is trained: nothing is kept of them as they were")

    def updated(self, rate: float) -> None:
        pass


def whole_networks(base: Base, family: Family) -> list[Whole]:
    """Let a family's networks be trained themselves.

    Raises:
        BadInput: No text encoder can be trained, but that was asked for.
        ValueError: Another run works with this family.
    """
    if hasattr(family.denoiser, "methods_in_use"):
        raise ValueError("another run works with this base")
    found = [Whole(_trainable(family.denoiser_prefix, family.denoiser))]
    if base.train_text_encoder:
        rate = text_encoder_rate(base)
        for prefix, encoder in trained_text_encoders(base, family).items():
            found.append(Whole(_trainable(prefix, encoder), rate))
        _freeze_unread(family)
        found = [Whole(_still(whole.parameters), whole.rate) for whole in found]
    return found


def _trainable(prefix: str, network: nn.Module) -> dict[str, nn.Parameter]:
    network.requires_grad_(True)
    return {f"{prefix}.{name}": parameter for name, parameter in network.named_parameters()}


def _still(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}


def _freeze_unread(family: Family) -> None:
    """Freeze what of the text encoders no gradient reaches: layers behind the one that is read.

    Weight decay would shrink them, step by step, for whoever reads them.
    """
    said = family.encode_tokens([family.token_ids("a photo")])
    for tensor in said.values():
        if tensor.requires_grad:
            tensor.sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
    for encoder in family.text_encoders.values():
        for parameter in encoder.parameters():
            parameter.requires_grad_(parameter.grad is not None)
            parameter.grad = None
