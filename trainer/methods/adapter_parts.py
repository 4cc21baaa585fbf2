"""What an adapter's file holds, module by module, whoever wrote it: its parts by our names, and checked.

What cannot be an adapter of one model is refused by the key in the file: parts without their other half,
factors that do not fit, numbers that are none.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from storage.errors import InvalidName

from ..errors import BadInput
from ..tensor_file import read
from .layers import MAGNITUDE
from .module_names import Module

OTHER_BASE = "an adapter fits only the kind of base model that it was trained on"
FAMILIES = "adapters of Stable Diffusion 1, 2, XL and 3 are read"
_ONLY_LORA = "DoRA is read where it goes with LoRA"
_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
"""In which some programs write alphas."""
_FLUX = ("single_transformer_blocks", "double_blocks", "single_blocks")
"""Words of FLUX's names, in diffusers and in kohya's scripts."""
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


def opened(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the header of a file: numbers, all of them finite.

    Raises:
        BadInput: It is not there, damaged, or holds something else.
    """
    if path.suffix != ".safetensors":
        raise BadInput(f"adapter {path}: only .safetensors files are read, never pickles")
    try:
        tensors, metadata = read(path)
    except OSError as error:
        raise BadInput(f"adapter {path} cannot be read: {error.strerror or error}") from error
    except InvalidName as error:
        raise BadInput(f"adapter {error}", "an adapter has a few thousand tensors") from error
    except SafetensorError as error:
        raise BadInput(
            f"adapter {path} is cut off or no .safetensors file, whatever it is called: {error}",
            "give a .safetensors file of an adapter",
        ) from error
    for key, tensor in tensors.items():
        if tensor.dtype not in (*_TYPES, *(_WHOLE if key.endswith(".alpha") else ())):
            said = str(tensor.dtype).removeprefix("torch.")
            raise BadInput(
                f"adapter {path}: {key} is of the type {said}, expected float16, bfloat16 or float32",
                "give the file that it was quantised from",
            )
        if not torch.isfinite(tensor).all():
            raise BadInput(f"adapter {path}: {key} holds NaN or infinity", "its training diverged")
    return tensors, metadata


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
        BadInput: A tensor is no part of an adapter, or of a module that is not found, or there a second time
            by another name, or does not fit the others of its module.
    """
    found: dict[Module, dict[str, Tensor]] = defaultdict(dict)
    keys: dict[tuple[Module, str], str] = {}
    endings = {f".{called}": part for part, those in PARTS.items() for called in those}
    for key, tensor in tensors.items():
        ending = max((e for e in endings if key.endswith(e)), key=len, default=None)
        if ending is None:
            raise BadInput(
                f"adapter {path}: {key} belongs to no kind of adapter that is known here",
                "LoRA, DoRA, LoHa and LoKr files of diffusers, kohya and LyCORIS can be read",
            )
        called, part = key.removesuffix(ending), endings[ending]
        module = named(called)
        if module is None and any(word in called for word in _FLUX):
            raise BadInput(f"adapter {path} is of FLUX, which is not supported: it has {called}", FAMILIES)
        if module is None:
            raise BadInput(f"adapter {path}: {among} no module {called}", OTHER_BASE)
        if (first := keys.setdefault((module, part), key)) != key:
            raise BadInput(
                f"adapter {path}: {key} is the same part of the same module as {first}",
                "two programs' names are in one file: keep those of one",
            )
        found[module][part] = tensor
    if not found:
        raise BadInput(f"adapter {path} is empty")
    for (network, name), parts in found.items():
        _check(path, f"{network}.{name}", parts)
    return found


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


def _check(path: Path, where: str, parts: Mapping[str, Tensor]) -> None:
    kind_of(path, where, parts)
    alpha = parts.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        raise BadInput(f"adapter {path}: alpha of {where} has shape {list(alpha.shape)}, expected one number")
    if problem := _misfit(parts):
        raise BadInput(f"adapter {path}: {where}: {problem}", "the file is damaged, or of another base")


def _misfit(t: Mapping[str, Tensor]) -> str | None:
    """Say which factors of a module cannot be multiplied, or return None."""
    for part, tensor in t.items():
        if part not in ("alpha", MAGNITUDE) and tensor.ndim < 2:
            return f"{part} has shape {list(tensor.shape)}, expected a matrix"
    for left, right in (
        ("lora_B.weight", "lora_A.weight"),
        ("hada_w1_a", "hada_w1_b"),
        ("hada_w2_a", "hada_w2_b"),
        ("lokr_w1_a", "lokr_w1_b"),
        ("lokr_w2_a", "lokr_w2_b"),
    ):
        if (left in t) != (right in t):
            present, absent = (left, right) if left in t else (right, left)
            return f"{present} has no {absent}"
        if left in t:
            if t[left].ndim not in (2, 4) or t[right].ndim not in (2, 4):
                return f"{left} has shape {list(t[left].shape)}, {right} {list(t[right].shape)}"
            # Tucker's factors are (R, O) and (R, I); between them there is (R, R, k, k).
            core = t.get(f"hada_t{left[6]}") if left.startswith("hada_") else None
            inner = (len(t[left]), *core.shape[:1]) if core is not None else (t[left].shape[1],)
            if any(size != len(t[right]) for size in inner) or 0 in (*t[left].shape, *t[right].shape):
                return f"{left} of shape {list(t[left].shape)} does not fit {right} of {list(t[right].shape)}"
    if (
        "hada_w1_b" in t
        and (t["hada_w1_a"].shape[0], t["hada_w1_b"].shape[1:])
        != (
            t["hada_w2_a"].shape[0],
            t["hada_w2_b"].shape[1:],
        )
        and "hada_t1" not in t
    ):
        return "its two products have different shapes"
    up = t.get("lora_B.weight")
    if up is not None and up.numel() != up.shape[0] * up.shape[1]:
        return f"lora_B.weight has shape {list(up.shape)}, expected a kernel of 1"
    if MAGNITUDE in t and t[MAGNITUDE].numel() != len(t["lora_B.weight"]):
        return f"{len(t['lora_B.weight'])} outputs and {t[MAGNITUDE].numel()} magnitudes"
    return None
