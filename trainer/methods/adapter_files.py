"""Reads an adapter file of any of the usual forms, as tensors and configurations of our own checkpoints.

    ours       a checkpoint's ``adapter.safetensors``, configurations in the header
    diffusers  ``unet.….lora_A.weight``, alpha in the header ``lora_adapter_metadata``, else equal to the rank
    kohya      ``lora_unet_….lora_down.weight`` with an alpha per module; ``dora_scale`` for DoRA
    LyCORIS    kohya's modules with ``hada_*`` (LoHa) or ``lokr_*`` (LoKr)

A file means something for one base model only: every module that it names must be there.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.tuners.lokr.layer import factorization
from safetensors import SafetensorError
from torch import Tensor, nn

from storage.errors import InvalidName

from ..errors import BadInput
from ..tensor_file import read
from .configs import Told, read_configs
from .layers import MAGNITUDE
from .module_names import Module, known_names

_OTHER_BASE = "an adapter fits only the kind of base model that it was trained on"
_ONLY_LORA = "DoRA is read where it goes with LoRA"
PARTS = {
    "lora_A.weight": (
        "lora_A.weight",
        "lora_down.weight",
        "lora.down.weight",
        "lora_linear_layer.down.weight",
    ),
    "lora_B.weight": ("lora_B.weight", "lora_up.weight", "lora.up.weight", "lora_linear_layer.up.weight"),
    MAGNITUDE: (MAGNITUDE, f"{MAGNITUDE}.weight", "dora_scale"),
    **{
        part: (part,)
        for part in (
            *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
            *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
            "alpha",
        )
    },
}
"""Our names of an adapter's parts, and how files call them."""


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """An adapter as a checkpoint of ours would hold it."""

    tensors: Mapping[str, Tensor]
    """fp32, by ``<network>.<module>.<part>``."""
    configs: Mapping[str, Told]
    """By network, see ``configs``."""


def read_adapter_file(path: Path, networks: Mapping[str, nn.Module]) -> AdapterFile:
    """Read a file that was made for this base model.

    Args:
        networks: The base's, by ``unet``, ``transformer``, ``text_encoder``, ``text_encoder_2``…

    Raises:
        BadInput: It is missing, no adapter, of a form that is not known, or of another base. Names the first
            thing that does not fit.
    """
    if path.suffix != ".safetensors":
        raise BadInput(f"adapter {path}: only .safetensors files are read, never pickles")
    try:
        tensors, metadata = read(path)
    except (OSError, SafetensorError, InvalidName) as error:
        raise BadInput(f"adapter {path}: {error}", "give a .safetensors file of an adapter") from error
    modules = by_module(path, tensors, known_names(networks).get)
    told = told_in_header(path, metadata)
    found: dict[str, Tensor] = {}
    configs: dict[str, Told] = {}
    for network in sorted({network for network, _ in modules}):
        parts = {name: those for (of, name), those in modules.items() if of == network}
        configs[network] = told.get(network) or _told_by_tensors(path, parts, networks[network])
        for name, those in parts.items():
            found |= {f"{network}.{name}.{part}": t.float() for part, t in those.items() if part != "alpha"}
    return AdapterFile(found, configs)


def by_module(
    path: Path,
    tensors: Mapping[str, Tensor],
    named: Callable[[str], Module | None],
    *,
    among: str = "this base model has",
) -> dict[Module, dict[str, Tensor]]:
    """Sort the tensors of a file by module and part.

    Args:
        named: The module that a file calls so.
        among: Who has no module that is not found, for the message.

    Raises:
        BadInput: A tensor is no part of an adapter, or of a module that is not found.
    """
    found: dict[Module, dict[str, Tensor]] = defaultdict(dict)
    endings = {f".{called}": part for part, those in PARTS.items() for called in those}
    for key, tensor in tensors.items():
        ending = max((e for e in endings if key.endswith(e)), key=len, default=None)
        if ending is None:
            raise BadInput(
                f"adapter {path}: {key} belongs to no kind of adapter that is known here",
                "LoRA, DoRA, LoHa and LoKr files of diffusers, kohya and LyCORIS can be read",
            )
        module = named(key.removesuffix(ending))
        if module is None:
            raise BadInput(f"adapter {path}: {among} no module {key.removesuffix(ending)}", _OTHER_BASE)
        found[module][endings[ending]] = tensor
    if not found:
        raise BadInput(f"adapter {path} is empty")
    return found


def told_in_header(path: Path, metadata: Mapping[str, str]) -> dict[str, Told]:
    """Return the configurations that a header holds, in our form or in diffusers'."""
    if "config" in metadata:
        try:
            return dict(read_configs(metadata))
        except ValueError:
            return {}  # somebody else's word
    try:
        flat = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError as error:
        raise BadInput(f"adapter {path}: its lora_adapter_metadata is damaged") from error
    told: dict[str, dict[str, Any]] = defaultdict(lambda: {"peft_type": "LORA"})
    kept = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_dora", "use_rslora")
    for key, value in flat.items():
        network, _, name = key.partition(".")
        if name in kept and value is not None:
            told[network][name] = value
    return dict(told)


def _told_by_tensors(path: Path, parts: Mapping[str, Mapping[str, Tensor]], root: nn.Module) -> Told:
    """Return the configuration that tensors say themselves: ranks by their shapes, alpha by its own."""
    kinds = {kind_of(path, name, those) for name, those in parts.items()}
    if len(kinds) > 1:
        raise BadInput(f"adapter {path} mixes {' and '.join(sorted(kinds))}", "use one file for each")
    (kind,) = kinds
    ranks = {name: rank_of(those) for name, those in parts.items()}
    alphas = {name: alpha_of(those, ranks[name]) for name, those in parts.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    told: dict[str, Any] = {
        "peft_type": kind,
        "r": rank,
        "target_modules": sorted(parts),
        "rank_pattern": {name: other for name, other in ranks.items() if other != rank},
        "alpha_pattern": {name: other for name, other in alphas.items() if other != alpha},
    }
    match kind:
        case "LORA":
            return told | {
                "lora_alpha": alpha,
                "use_dora": any(MAGNITUDE in those for those in parts.values()),
            }
        case "LOHA":
            tucker = any("hada_t1" in those for those in parts.values())
            return told | {"alpha": alpha, "use_effective_conv2d": tucker}
    split = any("lokr_w1_a" in those for those in parts.values())
    factor = _factor(path, parts, root)
    return told | {"alpha": alpha, "decompose_both": split, "decompose_factor": factor}


def kind_of(path: Path, name: str, parts: Mapping[str, Tensor]) -> str:
    """Return ``LORA``, ``LOHA`` or ``LOKR``.

    Raises:
        BadInput: Parts of the module ``name`` are missing.
    """
    for kind, needed in (
        ("LORA", ({"lora_A.weight"}, {"lora_B.weight"})),
        ("LOHA", ({"hada_w1_a"}, {"hada_w1_b"}, {"hada_w2_a"}, {"hada_w2_b"})),
        ("LOKR", ({"lokr_w1", "lokr_w1_b"}, {"lokr_w2", "lokr_w2_b"})),
    ):
        if all(choices & parts.keys() for choices in needed):
            if kind != "LORA" and MAGNITUDE in parts:
                raise BadInput(
                    f"adapter {path}: {name} has magnitudes (dora_scale) beside {kind}", _ONLY_LORA
                )
            return kind
    raise BadInput(
        f"adapter {path}: of {name} there is only {', '.join(sorted(parts))}", "the file is damaged"
    )


def rank_of(parts: Mapping[str, Tensor]) -> int:
    """Return the rank that the shapes of a module's parts say."""
    for part in ("lora_A.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if part in parts:
            return len(parts[part])
    # Both factors whole: some rank for which PEFT has them so.
    return int(max((*parts["lokr_w1"].shape, *parts["lokr_w2"].shape[:2])))


def alpha_of(parts: Mapping[str, Tensor], rank: int) -> float:
    """Return alpha. Without one the scale is 1; so it is for LoKr with two whole factors, as in LyCORIS."""
    if {"lokr_w1", "lokr_w2"} <= parts.keys() or "alpha" not in parts:
        return float(rank)
    alpha = float(parts["alpha"])
    return alpha if math.isfinite(alpha) else float(rank)


def _factor(path: Path, parts: Mapping[str, Mapping[str, Tensor]], root: nn.Module) -> int:
    """Return the factor by which LoKr split the sizes of all modules."""
    shapes = {}
    for name, those in parts.items():
        layer: Any = root.get_submodule(name)
        out, into = getattr(layer, "base_layer", layer).weight.shape[:2]
        w1 = those.get("lokr_w1")
        first = tuple(w1.shape) if w1 is not None else (len(those["lokr_w1_a"]), those["lokr_w1_b"].shape[1])
        shapes[name] = (out, into, first)
    for factor in (-1, *sorted({size for *_, first in shapes.values() for size in first})):
        if all(
            (factorization(out, factor)[0], factorization(into, factor)[0]) == first
            for out, into, first in shapes.values()
        ):
            return factor
    raise BadInput(f"adapter {path}: its LoKr factors have sizes that no single factor gives", _OTHER_BASE)
