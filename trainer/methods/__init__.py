"""What is trained on top of a frozen base, behind one small interface.

A method puts parameters of its own beside the networks of a family. Several compose as a list, ``Methods``;
checkpoints, the optimizer and the step loop see only named fp32 tensors. Runs that share a base in one
process give their methods different names, and ``use`` theirs before they compute.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

from ..config import Base
from ..config.textual_inversion import steps_of
from ..config.trained import Trained
from ..families import Family


class Method(Protocol):
    """Trainable parameters attached to a base model."""

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """By the name that they have in a checkpoint, in the order of names; fp32."""

    rate: float
    """Their learning rate, as a multiple of the run's."""

    def metadata(self) -> dict[str, str]:
        """What a reader needs besides the tensors, for the header of the checkpoint's file."""

    def use(self) -> None:
        """Let the base compute with these parameters, and with no other run's."""

    def stand_aside(self) -> None:
        """Let the base compute as if it had never been attached, until ``use``."""

    def updated(self, rate: float) -> None:
        """Called after each optimizer step that moved the parameters, with their learning rate: whatever
        keeps them within bounds."""


class Methods:
    """All that one run trains."""

    def __init__(self, members: Sequence[Method], denoiser: Any, steps: Sequence[range] = ()) -> None:
        """
        Args:
            steps: For each member, the optimizer steps at which it is trained; by default all.

        Raises:
            ValueError: Two of them name a parameter alike.
        """
        self.members = tuple(members)
        self._steps = tuple(steps)
        self._resting: list[Method] = []
        self._denoiser = denoiser
        named = [pair for member in members for pair in member.parameters.items()]
        self.parameters: dict[str, nn.Parameter] = dict(sorted(named))
        if len(self.parameters) != len(named):
            raise ValueError("two methods name a parameter alike")

    @property
    def begins(self) -> dict[str, int]:
        """The optimizer step, counted from 0, from which each parameter is trained."""
        starts = [steps.start for steps in self._steps] or [0] * len(self.members)
        return {n: start for m, start in zip(self.members, starts, strict=True) for n in m.parameters}

    def at(self, step: int) -> list[nn.Parameter]:
        """Let only what is trained at optimizer step ``step`` have gradients, until told of another step, and
        return it. What rests computes as ever, but gets no gradient, which optimizers take no notice of."""
        pairs = zip(self.members, self._steps, strict=True) if self._steps else ()
        self._resting = [member for member, steps in pairs if step not in steps]
        resting = {name for member in self._resting for name in member.parameters}
        return [parameter for name, parameter in self.parameters.items() if name not in resting]

    def groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """Return the parameters in groups, each with its multiple of the learning rate."""
        return [(list(member.parameters.values()), member.rate) for member in self.members]

    def metadata(self) -> dict[str, str]:
        """Return the headers of all members as one, with their ``config`` by network put together."""
        told = [member.metadata() for member in self.members]
        merged = {key: value for each in told for key, value in each.items()}
        if configs := [json.loads(each["config"]) for each in told if "config" in each]:
            merged["config"] = json.dumps(
                {k: v for config in configs for k, v in config.items()}, sort_keys=True
            )
        return merged

    def use(self) -> None:
        """Let the base compute with these, and with no other run's."""
        used = getattr(self._denoiser, "methods_in_use", self.members)
        for other in used if used is not self.members else ():
            other.stand_aside()
        self._denoiser.methods_in_use = self.members
        for member in self.members:
            member.use()
        for member in self._resting:
            for parameter in member.parameters.values():
                parameter.requires_grad_(False)

    def updated(self, rate: float) -> None:
        """Tell all that the step moved, at this learning rate of the run."""
        for member in self.members:
            if member not in self._resting:
                member.updated(rate * member.rate)

    @contextmanager
    def only(self, kind: type) -> Iterator[None]:
        """Within, the base computes with those of one class, and with no other."""
        for member in self.members:
            if not isinstance(member, kind):
                member.stand_aside()
        try:
            yield
        finally:
            self.use()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within, the base computes as if nothing had been attached."""
        for member in self.members:
            member.stand_aside()
        try:
            yield
        finally:
            self.use()


def attach(base: Base, family: Family, name: str = "default") -> Methods:
    """Put freshly initialised parameters, a function of the seed only, beside the family's networks.

    Args:
        name: Tells the runs apart that share the family.

    Raises:
        BadInput: The targets name no module of this model, or the rank is above a layer's size.
    """
    family.ready()
    # In an order of ours: what comes before a layer comes before an adapter around that layer too.
    members = [
        (member, steps_of(base, what))
        for what in _ATTACH
        if what in base.train
        for member in _ATTACH[what](base, family, name)
    ]
    methods = Methods([m for m, _ in members], family.denoiser, [steps for _, steps in members])
    methods.use()
    return methods


def _adapters(base: Base, family: Family, name: str) -> Sequence[Method]:
    from .adapter import adapters  # methods share this module

    return adapters(base, family, name)


def _full(base: Base, family: Family, name: str) -> Sequence[Method]:
    from .full import whole_networks

    return whole_networks(base, family)


def _hypernetwork(base: Base, family: Family, name: str) -> Sequence[Method]:
    from .hypernetwork import hypernetworks

    return hypernetworks(base, family, name)


def _textual_inversion(base: Base, family: Family, name: str) -> Sequence[Method]:
    from .textual_inversion import textual_inversion

    return textual_inversion(base, family, name)


_ATTACH: Mapping[Trained, Callable[[Base, Family, str], Sequence[Method]]] = {
    "full": _full,
    "adapter": _adapters,
    "hypernetwork": _hypernetwork,
    "textual_inversion": _textual_inversion,
}


def restore(methods: Methods, tensors: Mapping[str, Tensor]) -> str | None:
    """Copy saved tensors into the parameters. Say what does not fit and change nothing, or return None."""
    if tensors.keys() != methods.parameters.keys():
        odd = sorted(tensors.keys() ^ methods.parameters.keys())
        return f"{len(odd)} tensors are missing or unknown, e.g. {odd[0]}"
    for name, parameter in methods.parameters.items():
        if tensors[name].shape != parameter.shape:
            return f"{name} has shape {list(tensors[name].shape)}, expected {list(parameter.shape)}"
    for name, parameter in methods.parameters.items():
        parameter.data.copy_(tensors[name])
    return None
