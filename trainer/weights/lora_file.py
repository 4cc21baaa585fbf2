"""An adapter's file without its base: its modules, checked one by one.

Every form is read that ``methods.adapter_files`` reads, and refused what ``methods.adapter_parts`` refuses.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..errors import BadInput
from ..export.modules import AdaptedModule, Kind
from ..methods.adapter_files import told_in_header
from ..methods.adapter_parts import FAMILIES, alpha_of, by_module, kind_of, rank_of
from ..methods.configs import CONFIG, Told, scale_of
from ..methods.layers import MAGNITUDE
from ..methods.module_names import TEXT_LEVEL, Module
from ..methods.peft_files import is_peft, opened
from .names import module_of

Form = Literal["diffusers", "kohya", "ours", "peft"]

_WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
"""How wide the text is that the UNet's attention reads."""
_FLUX_WIDTH = 3072
_VERSIONS = {"sdxl": "sdxl", "sd_v1": "sd1", "sd_v2": "sd2", "sd3": "sd3"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraFile:
    """What a file says, by diffusers' names of modules."""

    path: Path
    """A file, or a folder of PEFT's."""
    form: Form
    family: str | None
    """``sd1``, ``sd2``, ``sdxl``, ``sd3``; None if neither header nor tensors tell."""
    modules: tuple[AdaptedModule, ...]
    """In the order of names; tensors fp32 (or fp64)."""
    metadata: Mapping[str, str]
    dtype: torch.dtype
    """Of most tensors."""

    @property
    def kind(self) -> Kind:
        return self.modules[0].kind

    @property
    def has_magnitudes(self) -> bool:
        """Whether it is a DoRA."""
        return any(module.magnitude is not None for module in self.modules)


def read_lora(path: Path) -> LoraFile:
    """Read and check an adapter's file, or a folder of PEFT's.

    Raises:
        BadInput: It is missing, no adapter, damaged, or too costly to read. Names the first wrong key.
    """
    tensors, metadata = opened(path)
    parts = by_module(path, tensors, module_of, among="the families that are known here have")
    told = told_in_header(path, metadata)
    modules = tuple(
        _checked(path, network, name, parts[network, name], told.get(network))
        for network, name in sorted(parts)
    )
    _refuse_flux(path, modules)
    kinds = Counter(module.kind for module in modules)
    if len(kinds) > 1:
        odd = next(m for m in modules if m.kind == min(kinds, key=lambda kind: kinds[kind]))
        raise BadInput(f"adapter {path}: {odd.network}.{odd.name} is a {odd.kind}, others are not")
    return LoraFile(
        path=path,
        form=_form(path, tensors, metadata),
        family=family_of(modules, metadata, tensors),
        modules=modules,
        metadata=metadata,
        dtype=Counter(t.dtype for k, t in tensors.items() if not k.endswith(".alpha")).most_common(1)[0][0],
    )


def with_level(network: str, name: str) -> str:
    """Return a module's name with the level that transformers 5 leaves out: patterns without it fit too."""
    is_clip = network.startswith("text_encoder") and name.startswith("encoder.layers")
    return TEXT_LEVEL + name if is_clip else name


def family_of(
    modules: tuple[AdaptedModule, ...], metadata: Mapping[str, str], keys: Mapping[str, Tensor]
) -> str | None:
    """Return the family whose modules these are, by networks, header, width of the text, or depth."""
    networks = {module.network for module in modules}
    if "transformer" in networks:
        return "sd3"
    if "text_encoder_2" in networks or any(key.startswith("lora_te1_") for key in keys):
        return "sdxl"
    version = metadata.get("ss_base_model_version", "")
    if known := next((name for start, name in _VERSIONS.items() if version.startswith(start)), None):
        return known
    reads_text = [m for m in modules if m.network == "unet" and m.name.endswith(("attn2.to_k", "attn2.to_v"))]
    for module in reads_text:
        down = module.tensors.get("lora_A.weight", module.tensors.get("hada_w1_b"))
        if down is not None and down.shape[1] in _WIDTHS:
            return _WIDTHS[down.shape[1]]
    if any(".transformer_blocks.1." in module.name for module in modules if module.network == "unet"):
        return "sdxl"
    return None


def _refuse_flux(path: Path, modules: tuple[AdaptedModule, ...]) -> None:
    """Of FLUX's blocks one kind has the very names of SD3's, and another width."""
    for module in modules:
        down = module.tensors.get("lora_A.weight", module.tensors.get("hada_w1_b"))
        reads_image = module.network == "transformer" and module.name.endswith((".attn.to_q", ".attn.to_k"))
        if reads_image and down is not None and down.shape[1] == _FLUX_WIDTH:
            where = f"{module.network}.{module.name} reads {_FLUX_WIDTH} numbers"
            raise BadInput(f"adapter {path} is of FLUX, which is not supported: {where}", FAMILIES)


def _checked(
    path: Path, network: str, name: str, parts: Mapping[str, Tensor], told: Told | None
) -> AdaptedModule:
    kind = kind_of(path, f"{network}.{name}", parts)
    tensors = {part: t if t.dtype == torch.float64 else t.float() for part, t in parts.items()}
    tensors.pop("alpha", None)
    rank = rank_of(tensors)
    if MAGNITUDE in tensors:
        tensors[MAGNITUDE] = _as_peft_has_it(tensors)
    scale = (
        alpha_of(parts, rank) / rank if told is None else _told_scale(path, (network, name), kind, rank, told)
    )
    return AdaptedModule(network=network, name=name, rank=rank, scale=scale, tensors=tensors)


def _told_scale(path: Path, module: Module, kind: str, rank: int, told: Told) -> float:
    where, called = ".".join(module), with_level(*module)
    if told.get("peft_type") != kind:
        raise BadInput(f"adapter {path}: {where} is a {kind}, its header says {told.get('peft_type')}")
    try:
        one = {**told, "lora_alpha": 1.0, "alpha_pattern": {}, "use_rslora": False}
        says = round(1 / scale_of(one, called))
        scale = scale_of(told, called)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, re.error) as error:
        raise BadInput(f"adapter {path}: its header says of {where} no rank and alpha: {error!r}") from error
    if kind == "LORA" and says != rank:
        raise BadInput(f"adapter {path}: {where} has rank {rank}, its header says {says}")
    return scale


def _as_peft_has_it(t: Mapping[str, Tensor]) -> Tensor:
    """Return DoRA's magnitudes as (O,), or of a convolution as (1, O, 1, 1)."""
    flat_O = t[MAGNITUDE].flatten()
    return flat_O.reshape(1, -1, 1, 1) if t["lora_A.weight"].ndim == 4 else flat_O


def _form(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Form:
    if is_peft(path):
        return "peft"
    if CONFIG in metadata and "method" in metadata:
        return "ours"
    return "kohya" if next(iter(tensors)).startswith("lora_") else "diffusers"
