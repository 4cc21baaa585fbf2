"""What a prediction costs. Pure functions of what they are given; nothing is drawn here."""

from torch import Tensor

from ..config import Base
from .process import Process


class Objective:
    """The training loss of one run, by its ``loss`` and ``loss_weighting``."""

    def __init__(self, base: Base, process: Process) -> None:
        self._base = base
        self._process = process

    def losses(
        self, predicted_BCHW: Tensor, target_BCHW: Tensor, timesteps_B: Tensor, mask_B1HW: Tensor | None
    ) -> Tensor:
        """Return the weighted loss of each sample in fp32, shape (B,).

        Args:
            mask_B1HW: What each latent counts, in [0, 1]; None: all count 1.
        """
        error_BCHW = (predicted_BCHW.float() - target_BCHW.float()).square()
        return error_BCHW.flatten(1).mean(1)
