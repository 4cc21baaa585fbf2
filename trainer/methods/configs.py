"""What an adapter is beside its tensors: as much as rebuilds it through PEFT, in JSON.

The header of a checkpoint's ``adapter.safetensors`` holds under ``config`` one object by network
(``unet``, ``transformer``, ``text_encoder``, ``text_encoder_2``). Each has ``peft_type`` (``LORA``, ``LOHA``,
``LOKR``) and PEFT's own names of what follows:

    all     r, target_modules, rank_pattern, alpha_pattern
    LORA    lora_alpha, use_dora, use_rslora
    LOHA    alpha
    LOKR    alpha, decompose_factor

The two patterns are absent where every layer has the rank and alpha named above.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key

from ..config import Base

Told = Mapping[str, Any]
"""What the header says of one network's adapter."""

CONFIG = "config"
"""The header's key."""

_OF_ALL = frozenset({"r", "target_modules", "rank_pattern", "alpha_pattern"})
KNOWN = {
    "LORA": _OF_ALL | {"lora_alpha", "use_dora", "use_rslora"},
    "LOHA": _OF_ALL | {"alpha", "use_effective_conv2d"},
    "LOKR": _OF_ALL | {"alpha", "decompose_both", "decompose_factor"},
}
"""What a header may say. PEFT knows more, and some of it names modules to import: no file may reach that."""


def told_of(base: Base, targets: Iterable[str], convolutions: Iterable[str]) -> dict[str, Any]:
    """Return what is to be told of an adapter with a run's settings.

    Args:
        targets: Endings of the names of modules that receive one.
        convolutions: Those of them that are convolutions with kernels larger than 1, and have a rank of their
            own.
    """
    told: dict[str, Any] = {
        "peft_type": base.adapter.upper(),
        "r": base.rank,
        "target_modules": sorted(targets),
    }
    match base.adapter:
        case "lora":
            told |= {
                "lora_alpha": base.lora_alpha,
                "use_dora": base.use_dora,
                "use_rslora": base.use_rslora,
            }
        case "loha":
            told |= {"alpha": base.lora_alpha}
        case "lokr":
            told |= {"alpha": base.lora_alpha, "decompose_factor": base.lokr_factor}
    if base.conv_rank and (endings := sorted(convolutions)):
        told["rank_pattern"] = dict.fromkeys(endings, base.conv_rank)
        told["alpha_pattern"] = dict.fromkeys(endings, base.lora_conv_alpha)
    return told


def told_by_module(kind: str, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """Return what is to be told of modules, each with a rank and an alpha of its own.

    Args:
        kind: ``LORA``, ``LOHA`` or ``LOKR``.
    """
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": kind,
        "r": rank,
        "lora_alpha" if kind == "LORA" else "alpha": alpha,
        "target_modules": sorted(ranks),
        "rank_pattern": {name: other for name, other in ranks.items() if other != rank},
        "alpha_pattern": {name: other for name, other in alphas.items() if other != alpha},
    }


def peft_config(told: Told, *, dropout: float = 0.0) -> PeftConfig:
    """Return PEFT's configuration. Initial values are ours to set, see ``initial``.

    Raises:
        ValueError: Of no kind that is known here, or with a key that is none of it.
    """
    given = {key: value for key, value in told.items() if key != "peft_type"}
    if odd := sorted(given.keys() - KNOWN.get(told.get("peft_type", ""), given.keys())):
        raise ValueError(f"its header says {odd[0]}, which is not known here")
    match told.get("peft_type"):
        case "LORA":
            return LoraConfig(**given, lora_dropout=dropout, bias="none")
        case "LOHA":
            return LoHaConfig(**given)
        case "LOKR":
            return LoKrConfig(**given, init_weights="lycoris")
    raise ValueError(f"adapter of an unknown kind, {told.get('peft_type')}")


def scale_of(told: Told, module: str) -> float:
    """Return what an adapter's product is multiplied by in a module: alpha over the rank or its root."""

    def own(patterns: Mapping[str, Any], value: Any) -> float:
        return float(patterns.get(get_pattern_key(list(patterns), module), value))

    rank = own(told.get("rank_pattern", {}), told["r"])
    alpha = own(told.get("alpha_pattern", {}), told["lora_alpha" if "lora_alpha" in told else "alpha"])
    return alpha / (math.sqrt(rank) if told.get("use_rslora") else rank)


def metadata_of(kind: str, configs: Mapping[str, Told]) -> dict[str, str]:
    """Return the header of a checkpoint's adapter, from the configurations by network."""
    return {"format": "pt", "method": kind, CONFIG: json.dumps(configs, sort_keys=True)}


def read_configs(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return the configurations by network that the header of a checkpoint's adapter holds.

    Raises:
        ValueError: It holds none.
    """
    try:
        configs = json.loads(metadata.get(CONFIG, ""))
        return {network: {"peft_type": told["peft_type"], **told} for network, told in configs.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError("the header says nothing of the adapter's configuration") from error
