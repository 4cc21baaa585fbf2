"""What the denoiser is told of a batch besides its texts and sizes; of hollowed ones see ``hidden``."""

from typing import Protocol

from .batch import Batch
from .families import Conditioning, Family


class Beside(Protocol):
    """A source of such conditioning, of one run."""

    def conditioning(self, batch: Batch) -> Conditioning:
        """Return it, batched, on the family's device."""


class Nothing:
    """See ``Beside``."""

    def conditioning(self, batch: Batch) -> Conditioning:
        return {}


NOTHING: Beside = Nothing()


class ControlImages:
    """See ``Beside``. Class images have no condition image: they are trained on without the ControlNet."""

    def __init__(self, family: Family) -> None:
        self._family = family

    def conditioning(self, batch: Batch) -> Conditioning:
        if batch.control_B3HW is None:
            return {}
        return self._family.control_conditioning(batch.control_B3HW)
