"""``RunSpec``: everything that defines a run's result, and nothing else.

The same words as in ``grid.yaml``: a run's spec is the file's ``base``, ``dataset``, ``prior``,
``validation``, ``samples`` and ``evaluate`` blocks with one cell of its ``parameters`` written over them; or
only its ``command``, with the cell's values filled in, where the program that trains is somebody else's.
What does not change the bytes of the adapter (where it runs, how often it checkpoints) is not here but in
``rundir.Options``.

Imports no torch: the control plane reads this package.
"""

from typing import Any, Literal, Self

from pydantic import SerializerFunctionWrapHandler, model_serializer, model_validator

from .adapter import AdapterKeys
from .base import Base
from .command import Command
from .consistency import contradictions
from .dataset import Concept, Dataset, Prior
from .looking import Evaluate, Samples, Validation
from .model import MergedAdapter
from .values import Frozen

__all__ = [
    "AdapterKeys",
    "Base",
    "Command",
    "Concept",
    "Dataset",
    "Evaluate",
    "Frozen",
    "MergedAdapter",
    "Prior",
    "RunSpec",
    "Samples",
    "Validation",
]


NO_BASE, NO_DATASET = Base(model=""), Dataset(path="")
"""Of a run with a ``command``, which names its own."""


class RunSpec(Frozen):
    """One run."""

    version: Literal[1] = 1
    base: Base = NO_BASE
    dataset: Dataset = NO_DATASET
    prior: Prior | None = None
    validation: Validation = Validation()
    samples: Samples | None = None
    evaluate: Evaluate | None = None
    command: Command | None = None

    @property
    def max_steps(self) -> int:
        """The run's last step."""
        return self.command.steps if self.command else self.base.max_train_steps

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = write(self)
        return {k: v for k, v in data.items() if k in ("version", "command")} if self.command else data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = self.model_fields_set - {"version", "command"}
        if self.command:
            if given:
                raise ValueError(f"{min(given)} is for our own trainer: beside command it would do nothing")
            return self
        if missing := {"base", "dataset"} - given:
            raise ValueError(f"{min(missing)} is missing, and there is no command either")
        if self.evaluate and not self.samples:
            raise ValueError("evaluate scores sample images, but there is no samples block")
        if self.base.lr_warmup_steps >= self.base.max_train_steps:
            raise ValueError(
                f"base.lr_warmup_steps ({self.base.lr_warmup_steps}) must be below "
                f"base.max_train_steps ({self.base.max_train_steps})"
            )
        if found := contradictions(self):
            raise ValueError("; ".join(found))
        return self
