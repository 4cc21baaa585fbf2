"""A hypernetwork: small networks before the keys and values of attention."""

from typing import Annotated, Literal

from pydantic import Field

from .values import Fraction, Frozen

Activation = Literal["linear", "relu", "leakyrelu", "elu", "swish", "tanh", "sigmoid", "mish"]
Multiples = Annotated[tuple[Annotated[float, Field(gt=0, le=16)], ...], Field(min_length=2, max_length=16)]


class HypernetworkKeys(Frozen):
    hypernetwork_layers: Multiples = (1, 2, 1)
    """Widths of its layers, as multiples of the width that it works on; the first and the last are 1."""
    hypernetwork_activation: Activation = "linear"
    """Between its layers, by A1111's names; ``swish`` is torch's Hardswish."""
    hypernetwork_layer_norm: bool = False
    """Normalise after each of its layers."""
    hypernetwork_dropout: Fraction = 0.0
    """Share that is dropped after each of its layers but the last."""
    hypernetwork_self_attention: bool = True
    """Also before self-attention, beside the attention that reads the text."""
