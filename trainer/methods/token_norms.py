"""What keeps learned tokens about as long as the words of the model, after each optimizer step. Pure.

Gradients make new tokens longer and longer, until they drown the rest of a prompt. With v a row, E the rows
of the model's own embedding, and lr the rate of the step:

    decay    v ← v/‖v‖ · (‖v‖ + λ (mean‖E‖ − ‖v‖)) with λ = min(1, 100 lr): a step towards the usual length
             (cloneofsimo's ``clip_ti_decay``, whose 0.4 is about the mean length of CLIP-L)
    retract  v ← v · (std E / std V)^0.1 with V all new rows (diffusers' advanced scripts)
    project  v ← v/‖v‖ · median‖E‖: exactly the usual length (OneTrainer)
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Rule = Literal["none", "decay", "retract", "project"]

RETRACTION = 0.1
DECAY = 100.0
_LEAST = 1e-12
"""No row is divided by less."""


@dataclass(frozen=True, slots=True)
class Usual:
    """How long the rows of an embedding are."""

    mean: float
    median: float
    std: float
    """Of all its numbers."""


def usual_of(table_VD: Tensor) -> Usual:
    lengths_V = table_VD.float().norm(dim=-1)
    return Usual(float(lengths_V.mean()), float(lengths_V.median()), float(table_VD.float().std()))


def held(rows_ND: Tensor, rule: Rule, usual: Usual, rate: float) -> Tensor:
    """Return new rows as a rule leaves them.

    Args:
        rate: The learning rate of the tokens at this step.
    """
    lengths_N1: Tensor = torch.linalg.vector_norm(rows_ND, dim=-1, keepdim=True).clamp_min(_LEAST)
    match rule:
        case "none":
            return rows_ND
        case "decay":
            pull = min(1.0, DECAY * rate)
            wanted_N1 = torch.lerp(lengths_N1, torch.full_like(lengths_N1, usual.mean), pull)
            return rows_ND * (wanted_N1 / lengths_N1)
        case "retract":
            return rows_ND * torch.pow(torch.std(rows_ND).clamp_min(_LEAST) / usual.std, -RETRACTION)
        case "project":
            return rows_ND / lengths_N1 * usual.median
