"""The optimizer, the learning rate as a function of the step, and the optimizer's state by name.

There is no scheduler object: the rate of a step is computed and written into the optimizer before the step,
so a resumed run has nothing to restore.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from .config import Base
from .errors import BadInput

MULTIPLE = "rate"
"""Of a parameter group: its multiple of the learning rate."""
SEPARATOR = "#"
"""Between a parameter's name and the name of its piece of state."""


def learning_rate(base: Base, step: int) -> float:
    """Return the rate of optimizer step ``step``, counted from 0.

    Rises linearly over ``lr_warmup_steps``, never being 0, then follows ``lr_scheduler`` down to just above 0
    at the last step.
    """
    warmup = base.lr_warmup_steps
    if step < warmup:
        return base.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / (base.max_train_steps - warmup)
    return base.learning_rate * _share(base, done)


def _share(base: Base, done: float) -> float:
    """Return what is left of the rate when ``done`` of the schedule is over, in [0, 1)."""
    match base.lr_scheduler:
        case "constant":
            return 1.0
        case "linear":
            return 1 - done
        case "polynomial":
            return float((1 - done) ** base.lr_power)
        case "cosine":
            return (1 + math.cos(math.pi * done)) / 2
        case "cosine_with_restarts":
            return (1 + math.cos(math.pi * (base.lr_num_cycles * done % 1))) / 2


Groups = Sequence[tuple[list[nn.Parameter], float]]
"""Parameters, and their multiple of the learning rate."""


def build_optimizer(base: Base, groups: Groups) -> torch.optim.Optimizer:
    """Return the run's optimizer over groups of parameters.

    Raises:
        BadInput: ``adamw8bit`` without bitsandbytes.
    """
    if base.optimizer == "adamw":
        make: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
    else:
        make = partial(_adamw8bit(), min_8bit_size=base.adam8bit_min_size)
    return make(
        [{"params": parameters, MULTIPLE: multiple} for parameters, multiple in groups],
        lr=base.learning_rate,
        betas=(base.adam_beta1, base.adam_beta2),
        eps=base.adam_epsilon,
        weight_decay=base.weight_decay,
    )


def _adamw8bit() -> Callable[..., torch.optim.Optimizer]:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise BadInput(
            f"base.optimizer adamw8bit needs bitsandbytes: {error}",
            "pip install bitsandbytes, or set base.optimizer to adamw",
        ) from error
    return cast(Callable[..., torch.optim.Optimizer], AdamW8bit)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group[MULTIPLE]


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Return every piece of state under ``<parameter>#<piece>``. A Python integer becomes an int64 scalar.

    The tensors are the optimizer's own: copy them before the next step.
    """
    return {
        f"{name}{SEPARATOR}{piece}": value
        if isinstance(value, Tensor)
        else torch.tensor(value, dtype=torch.int64)
        for name, parameter in parameters.items()
        for piece, value in sorted(optimizer.state[parameter].items())
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
) -> str | None:
    """Give a fresh optimizer saved state. Say what does not fit, or return None.

    No state at all is what an optimizer has before its first step, of which fp16 may have skipped a few.
    """
    if not tensors:
        return None
    state: dict[str, dict[str, Tensor | int]] = {name: {} for name in parameters}
    for key, tensor in tensors.items():
        name, _, piece = key.rpartition(SEPARATOR)
        if name not in state:
            return f"state of an unknown parameter, {name or key}"
        state[name][piece] = _piece(tensor, parameters[name].device)
    for name, pieces in state.items():
        if not pieces:
            return f"{name} has no optimizer state"
        optimizer.state[parameters[name]] = pieces
    return None


def _piece(tensor: Tensor, device: torch.device) -> Tensor | int:
    if tensor.dtype == torch.int64:
        return int(tensor)  # bitsandbytes counts steps in Python
    if tensor.dim() == 0:
        return tensor  # torch keeps its step counter on the CPU
    return tensor.to(device)
