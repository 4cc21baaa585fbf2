"""Adapters through PEFT: small trained matrices beside the frozen ones of a network.

    lora    y = W x + (alpha / r) B A x; rsLoRA: alpha / sqrt(r); DoRA also trains each output's magnitude
    loha    W + (alpha / r) (A1 B1) * (A2 B2), multiplied element by element
    lokr    W + (alpha / r) W1 ⊗ W2

An adapter starts as no change at all; its other initial numbers are a function of the run's seed only. It is
kept in fp32 whatever the base is kept in. ``configs`` says what a checkpoint's header tells of it, ``layers``
how its tensors are named.
"""

from collections.abc import Callable, Iterable, Mapping

from torch import nn

from ..config import Base
from ..families import Family
from . import layers
from .configs import Told, metadata_of, told_of
from .initial import initialise
from .targets import (
    TEXT_TARGETS,
    check_ranks,
    convolutions,
    named_targets,
    text_encoder_rate,
    trained_text_encoders,
)


class Adapter:
    """A PEFT adapter of one network. See ``Method``."""

    def __init__(
        self,
        network: nn.Module,
        name: str,
        parameters: Mapping[str, nn.Parameter],
        metadata: dict[str, str],
        rate: float = 1.0,
        beside: Callable[[], Iterable[nn.Module]] = tuple,
    ) -> None:
        """
        Args:
            beside: Further networks of the base, of which other runs may have adapters.
        """
        self._network = network
        self._beside = beside
        self._name = name
        self.parameters = parameters
        self.rate = rate
        self._metadata = metadata

    def metadata(self) -> dict[str, str]:
        return self._metadata

    def use(self) -> None:
        for network in (self._network, *self._beside()):
            layers.use(network, self._name)

    def stand_aside(self) -> None:
        for network in (self._network, *self._beside()):
            layers.stand_aside(network)

    def updated(self, rate: float) -> None:
        pass


def adapters(base: Base, family: Family, name: str) -> list[Adapter]:
    """Attach the run's adapters: to the denoiser, and to the text encoders if they are trained.

    Raises:
        BadInput: The targets name no module of this model, or the rank is above a layer's size.
    """
    targets = named_targets(base, family)
    told = told_of(base, targets, convolutions(family.denoiser, targets))
    denoiser = _attached(
        *(base, family.denoiser, family.denoiser_prefix, name, told),
        beside=lambda: family.text_encoders.values(),
    )
    found = [denoiser]
    if base.train_text_encoder:
        rate = text_encoder_rate(base)
        for prefix, encoder in trained_text_encoders(base, family).items():
            told = told_of(base, TEXT_TARGETS, ())
            found.append(_attached(base, encoder, prefix, name, told, rate))
    return found


def _attached(
    base: Base,
    network: nn.Module,
    prefix: str,
    name: str,
    told: Told,
    rate: float = 1.0,
    beside: Callable[[], Iterable[nn.Module]] = tuple,
) -> Adapter:
    check_ranks(base, network, prefix, told["target_modules"])
    inner = layers.inject(network, name, told, dropout=base.lora_dropout)
    initialise(inner, base.seed, "adapter" if prefix in ("unet", "transformer") else f"adapter {prefix}")
    layers.set_magnitudes(network, name)
    parameters = {f"{prefix}.{key}": parameter for key, parameter in inner.items()}
    return Adapter(network, name, parameters, metadata_of(base.adapter, {prefix: told}), rate, beside)
