"""The optimizer, the learning rate as a function of the step, and the optimizer's state by name.

There is no scheduler object: the rate of a step is computed and written into the optimizer before the step,
so a resumed run has nothing to restore.
"""

import contextlib
import io
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .config import Base
from .errors import BadInput

MULTIPLE = "rate"
"""Of a parameter group: its multiple of the learning rate."""
SEPARATOR = "#"
"""Between a parameter's name and the name of its piece of state."""
GROUP = "group."
"""Begins the name of a group of parameters; no parameter's name does."""
GROUP_STATE = frozenset({"d", "d_denom", "d_hat", "d_max", "d_numerator", "k"})
"""What optimizers keep in a group besides its settings: Prodigy, the step size that it estimates."""


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
        BadInput: Its library is not installed.
    """
    given = [{"params": parameters, MULTIPLE: multiple} for parameters, multiple in groups]
    with contextlib.redirect_stdout(io.StringIO()):  # Prodigy tells of its settings by print
        return _maker(base)(given, lr=base.learning_rate, weight_decay=base.weight_decay)


def _maker(base: Base) -> Callable[..., torch.optim.Optimizer]:
    betas, eps = (base.adam_beta1, base.beta2), base.adam_epsilon
    try:
        match base.optimizer:
            case "adamw":
                # One tensor at a time: all at once take another copy of the weights, which may be gigabytes.
                at_once = False if "full" in base.train else None
                return partial(torch.optim.AdamW, betas=betas, eps=eps, foreach=at_once)
            case "adamw8bit":
                from bitsandbytes.optim import AdamW8bit

                return partial(AdamW8bit, betas=betas, eps=eps, min_8bit_size=base.adam8bit_min_size)
            case "lion":
                from bitsandbytes.optim import Lion

                return partial(Lion, betas=betas)
            case "adafactor":
                from transformers.optimization import Adafactor

                # Its own schedule and its scaling by the parameters' size are off: a LoRA starts at 0.
                return partial(Adafactor, relative_step=False, scale_parameter=False, warmup_init=False)
            case "prodigy":
                from prodigyopt import Prodigy

                safe = base.lr_warmup_steps > 0  # else the warm-up is taken for a signal
                factor = base.prodigy_d_coef
                return partial(Prodigy, betas=betas, eps=eps, d_coef=factor, safeguard_warmup=safe)
    except ImportError as error:
        package = {"prodigy": "prodigyopt", "adafactor": "transformers"}.get(base.optimizer, "bitsandbytes")
        raise BadInput(
            f"base.optimizer {base.optimizer} needs {package}: {error}",
            f"pip install {package}, or set base.optimizer to adamw",
        ) from error


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group[MULTIPLE]


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Return every piece of state under ``<parameter>#<piece>``, and of groups under ``group.<n>#<piece>``.

    A Python integer becomes an int64 scalar, a Python float a float64 one. The tensors are the optimizer's
    own: copy them before the next step.
    """
    own = {
        f"{name}{SEPARATOR}{piece}": _tensor(value)
        for name, parameter in parameters.items()
        for piece, value in sorted(optimizer.state.get(parameter, {}).items())
    }
    return own | {
        f"{GROUP}{number}{SEPARATOR}{piece}": _tensor(group[piece])
        for number, group in enumerate(optimizer.param_groups)
        for piece in sorted(GROUP_STATE & group.keys())
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
) -> str | None:
    """Give a fresh optimizer saved state. Say what does not fit, or return None.

    No state of any parameter of a group is what an optimizer has before its first step with it: it rested
    until then, or fp16 skipped a few.
    """
    groups = {f"{GROUP}{number}": group for number, group in enumerate(optimizer.param_groups)}
    state: dict[str, dict[str, Tensor | int | float]] = {name: {} for name in parameters}
    for key, tensor in tensors.items():
        name, _, piece = key.rpartition(SEPARATOR)
        if name in groups and piece in GROUP_STATE:
            groups[name][piece] = tensor.item()
        elif name in state:
            state[name][piece] = _piece(piece, tensor, parameters[name].device)
        else:
            return f"state of an unknown parameter, {name or key}"
    names = {id(parameter): name for name, parameter in parameters.items()}
    for group in optimizer.param_groups:
        own = [names[id(parameter)] for parameter in group["params"]]
        without = [name for name in own if not state[name]]
        if without and len(without) < len(own):
            return f"{without[0]} has no optimizer state"
        for name in own if not without else ():
            optimizer.state[parameters[name]] = state[name]
    return None


def _tensor(value: Tensor | int | float) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)


def _piece(piece: str, tensor: Tensor, device: torch.device) -> Tensor | int | float:
    if tensor.dtype in (torch.int64, torch.float64):
        return tensor.item()  # libraries keep what they count in Python
    if piece == "step":
        return tensor  # torch keeps its step counter on the CPU
    return tensor.to(device)
