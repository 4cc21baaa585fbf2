"""What may be trained together, and which keys mean something then. See ``consistency``."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .adapter import AdapterKeys
from .base import Base
from .hypernetwork import HypernetworkKeys
from .textual_inversion import TextualInversionKeys
from .trained import Trained
from .values import Frozen

if TYPE_CHECKING:
    from . import RunSpec

_OWN_KEYS: dict[Trained, type[Frozen]] = {
    "adapter": AdapterKeys,
    "hypernetwork": HypernetworkKeys,
    "textual_inversion": TextualInversionKeys,
}
_OF_TEXT_ENCODERS = ("train_text_encoder", "text_encoder_learning_rate")
"""Keys of an adapter that mean the same where all of the base is trained."""


def ill_assorted(spec: "RunSpec") -> Iterator[str]:
    """Yield what of ``train`` cannot go together, and the keys that would do nothing."""
    base = spec.base
    if len(set(base.train)) < len(base.train):
        yield f"base.train names something twice: {', '.join(base.train)}"
    yield from _of_what_is_not_trained(base)
    if "full" in base.train:
        yield from _whole(spec)
    layers = base.hypernetwork_layers
    if layers[0] != 1 or layers[-1] != 1:
        yield (
            f"base.hypernetwork_layers {list(layers)}: what goes in and what comes out are as wide as the "
            "attention's context, so the first and the last are 1: [1, 2, 1]"
        )


def _of_what_is_not_trained(base: Base) -> Iterator[str]:
    named = ", ".join(base.train)
    for what, keys in _OWN_KEYS.items():
        if what in base.train:
            continue
        for key, field in keys.model_fields.items():
            shared = key in _OF_TEXT_ENCODERS and "full" in base.train
            if not shared and getattr(base, key) != field.get_default():
                yield f"base.{key} is of {what}, but base.train is {named}: leave {key} out, or train {what}"


def _whole(spec: "RunSpec") -> Iterator[str]:
    base = spec.base
    if others := [what for what in base.train if what != "full"]:
        yield (
            f"base.train: full changes all of the base, {others[0]} is trained beside a base that stays as "
            "it is: name one of the two"
        )
    if base.quantize != "none":
        yield (
            f"base.quantize {base.quantize} keeps what stays as it is, but base.train full changes it: "
            "leave quantize out; gradient_checkpointing and optimizer adamw8bit save memory, too"
        )
    if spec.prior and spec.prior.online:
        yield (
            "prior.online asks the base what it predicted before training, but base.train full changes the "
            "base itself: set prior.online to false, to train on class images"
        )
