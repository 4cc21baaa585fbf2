"""LoRA files in another rank, and several as one. Neither forms the change of a weight; both are LoRA's only.

A mix is the weighted sum of the changes, exactly: ranks add up. To sum the factors themselves, as PEFT's
``linear`` does, is another change. DoRA, LoHa and LoKr are no such product: none of them is mixed or resized.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..errors import BadInput
from ..export.modules import AdaptedModule
from ..methods.module_names import Module
from .lora_file import LoraFile, read_lora
from .low_rank import Choice, Factors, above, cumulative, fixed, frobenius, mix, ratio, resize
from .writing import agreed

_DESCRIBES = ("ss_network_dim", "ss_network_alpha", "ss_network_args")
"""What a header says of the ranks, which are others now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """How many singular values a module keeps: as few as any of these wants. One is given at least."""

    rank: int | None = None
    threshold: float | None = None
    """Those larger than this."""
    ratio: float | None = None
    """Those of at least this share of the largest."""
    cumulative: float | None = None
    """As few as have together this share of the sum of all."""
    frobenius: float | None = None
    """As few as have together this share of the Frobenius norm."""

    @property
    def is_given(self) -> bool:
        return bool(self._choices())

    @property
    def most(self) -> int | None:
        """As many singular values are enough to choose from; None if a share of all of them counts."""
        return self.rank if self.cumulative is None and self.frobenius is None else None

    def choice(self) -> Choice:
        """Return the rule.

        Raises:
            BadInput: None is given.
        """
        choices = self._choices()
        if not choices:
            raise BadInput("which rank?", "give --rank, --threshold, --ratio, --cumulative or --frobenius")
        return lambda values_R: min(choose(values_R) for choose in choices)

    def _choices(self) -> list[Choice]:
        return [
            *([fixed(self.rank)] if self.rank is not None else []),
            *([above(self.threshold)] if self.threshold is not None else []),
            *([ratio(self.ratio)] if self.ratio is not None else []),
            *([cumulative(self.cumulative)] if self.cumulative is not None else []),
            *([frobenius(self.frobenius)] if self.frobenius is not None else []),
        ]


def resized(lora: LoraFile, ranks: Ranks) -> LoraFile:
    """Return the best adapter of other ranks for the same changes (Eckart & Young), each with alpha = rank.

    Raises:
        BadInput: It is no LoRA.
    """
    keep = ranks.choice()
    modules = []
    for module in lora.modules:
        try:
            modules.append(from_factors(module, resize(factors_of(lora, module), keep)))
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            where = f"adapter {lora.path}: {module.network}.{module.name}"
            raise BadInput(f"{where} has numbers too large to be resized") from error
    said = {key: value for key, value in lora.metadata.items() if key not in _DESCRIBES}
    return replace(lora, modules=tuple(modules), metadata=said)


def mixed(parts: Sequence[tuple[LoraFile, float]]) -> LoraFile:
    """Return the weighted sum of what several adapters change, exactly; its form and type are the first's.

    Raises:
        BadInput: One is no LoRA, or they are of base models of different kinds.
    """
    first = parts[0][0]
    by_module: dict[Module, list[tuple[Factors, float]]] = {}
    named: dict[Module, AdaptedModule] = {}
    for lora, weight in parts:
        if not math.isfinite(weight):
            raise BadInput(f"the weight {weight} of {lora.path} is no number")
        if lora.family and first.family and lora.family != first.family:
            raise BadInput(
                f"{first.path} is of {first.family}, {lora.path} of {lora.family}", "mix one family"
            )
        for module in lora.modules:
            place = (module.network, module.name)
            by_module.setdefault(place, []).append((factors_of(lora, module), weight))
            named.setdefault(place, module)
    modules = []
    for place in sorted(by_module):
        try:
            modules.append(from_factors(named[place], mix(by_module[place])))
        except ValueError as error:
            raise BadInput(
                f"{'.'.join(place)}: {error}", "they are of base models of different kinds"
            ) from error
    said = agreed([{k: v for k, v in lora.metadata.items() if k not in _DESCRIBES} for lora, _ in parts])
    family = next((lora.family for lora, _ in parts if lora.family), None)
    return replace(first, modules=tuple(modules), metadata=said, family=family)


def read_weighted(word: str) -> tuple[LoraFile, float]:
    """Read ``FILE`` or ``FILE:WEIGHT``. See ``weighted`` and ``read_lora``."""
    path, weight = weighted(word)
    return read_lora(path), weight


def weighted(word: str) -> tuple[Path, float]:
    """Take ``FILE`` or ``FILE:WEIGHT`` apart; without a weight it is 1.

    Raises:
        BadInput: The weight is no finite number.
    """
    path, colon, said = word.rpartition(":")
    if not colon or said.endswith(".safetensors"):
        return Path(word), 1.0
    try:
        weight = float(said)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise BadInput(
            f"{word}: the weight {said} is no number", "write FILE or FILE:WEIGHT, such as a.safetensors:0.7"
        )
    return Path(path), weight


def factors_of(lora: LoraFile, module: AdaptedModule) -> Factors:
    """Return a module's two factors.

    Raises:
        BadInput: It is no LoRA.
    """
    where = f"adapter {lora.path}: {module.network}.{module.name}"
    if module.kind != "lora":
        raise BadInput(f"{where} is a {module.kind}", "only LoRA can be mixed and resized")
    if module.magnitude is not None:
        raise BadInput(
            f"{where} has DoRA's magnitudes, which no product holds", "merge it into a base instead"
        )
    down, up = module.tensors["lora_A.weight"], module.tensors["lora_B.weight"]
    # Of a convolution some programs write the second factor without the two axes of length 1.
    return Factors(down, up.reshape(*up.shape[:2], *(1 for _ in down.shape[2:])), module.scale)


def from_factors(module: AdaptedModule, factors: Factors) -> AdaptedModule:
    """Return a module with other factors."""
    tensors = {"lora_A.weight": factors.down, "lora_B.weight": factors.up}
    return replace(module, rank=factors.rank, scale=factors.scale, tensors=tensors)


def relative_error(before: LoraFile, after: LoraFile) -> float:
    """Return how far the changes of files with the same modules are apart, in the Frobenius norm over all."""
    apart = total = 0.0
    for old, new in zip(before.modules, after.modules, strict=True):
        was = factors_of(before, old)
        total += _square(was)
        apart += _square(mix([(was, 1.0), (factors_of(after, new), -1.0)]))
    return math.sqrt(max(0.0, apart) / total) if total else 0.0


def _square(factors: Factors) -> float:
    """The squared Frobenius norm of ``up @ down``, by the small matrices of products of their own."""
    up, down = factors.up.double().flatten(1), factors.down.double().flatten(1)
    return factors.scale**2 * float(torch.sum((up.T @ up) * (down @ down.T)))
