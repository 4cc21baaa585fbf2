"""What is trained on top of a frozen base, behind one small interface.

A method puts its parameters into the denoiser of a family. Checkpoints, the optimizer and the step loop see
only named fp32 tensors.
"""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from ..config import Base
from ..families import Family


class Method(Protocol):
    """Trainable parameters attached to a base model."""

    parameters: dict[str, nn.Parameter]
    """By the name that they have in a checkpoint, in the order of names; fp32."""

    def metadata(self) -> dict[str, str]:
        """What a reader needs besides the tensors, for the header of the checkpoint's file."""


def attach(base: Base, family: Family) -> Method:
    """Put freshly initialised parameters, a function of the seed only, into the family's denoiser.

    Raises:
        BadInput: The targets name no module of this model.
    """
    from .lora import Lora  # methods share this module

    return Lora.attach(base, family)


def restore(method: Method, tensors: Mapping[str, Tensor]) -> str | None:
    """Copy saved tensors into the parameters. Say what does not fit and change nothing, or return None."""
    if tensors.keys() != method.parameters.keys():
        odd = sorted(tensors.keys() ^ method.parameters.keys())
        return f"{len(odd)} tensors are missing or unknown, e.g. {odd[0]}"
    for name, parameter in method.parameters.items():
        if tensors[name].shape != parameter.shape:
            return f"{name} has shape {list(tensors[name].shape)}, expected {list(parameter.shape)}"
    for name, parameter in method.parameters.items():
        parameter.data.copy_(tensors[name])
    return None
