"""What an attempt has prepared before it knows where to start from."""

from dataclasses import dataclass

import torch

from .average import Average
from .beside import NOTHING, Beside
from .config import RunSpec
from .data import EncodedImage, TrainingSet
from .families import Family
from .methods import Methods
from .objective import Objective
from .ranks import ALONE, Ranks
from .rundir import Options, RunDir
from .stop import Stop
from .texts import Texts


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Everything the loop works with, ready to go. Only ``family`` may be shared with other runs."""

    spec: RunSpec
    options: Options
    run_dir: RunDir
    family: Family
    methods: Methods
    objective: Objective
    optimizer: torch.optim.Optimizer
    average: Average | None = None
    """With ``ema_decay``: what is validated, sampled and delivered instead of the parameters."""
    training: TrainingSet
    validation: list[EncodedImage]
    texts: Texts
    beside: Beside = NOTHING
    """What the denoiser is told of a batch besides texts and sizes."""
    stop: Stop
    ranks: Ranks = ALONE
    """The processes that compute this run together."""
