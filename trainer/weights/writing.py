"""Writes an adapter's modules as one file, in any form that some program reads. Never over another unasked.

diffusers   header with each network's rank and alpha, module by module
kohya       one alpha per module; A1111, Forge, ComfyUI, LyCORIS and kohya's scripts read it
ours        as in a checkpoint: PEFT's names, its configuration in the header
peft        a folder for each network, as ``PeftModel.from_pretrained`` reads it

A scale is kept as it was read: alpha over the rank.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import BadInput
from ..export.files import DTYPES, Dtype, hash_of_data, in_dtype, put
from ..export.modules import AdaptedModule
from ..export.naming import diffusers_tensors, kohya_tensors
from ..methods.adapter_files import told_in_header
from ..methods.configs import CONFIG, Told, metadata_of, told_by_module
from ..methods.module_names import TEXT_LEVEL
from ..methods.peft_files import ADAPTER_METADATA
from ..tensor_file import to_bytes
from .lora_file import Form, LoraFile, read_lora
from .peft_folder import check_replaceable, name_in_model, write_folder

_OF_THE_FORM = {"format", "method", CONFIG, ADAPTER_METADATA}
"""Keys of a header that belong to the form it is in."""
_PEFTS: tuple[Form, ...] = ("ours", "peft")
"""Forms that hold PEFT's configuration whole."""
_HASHES = ("sshs_", "modelspec.hash")


def convert(
    path: Path, out: Path, form: Form, *, dtype: Dtype | None = None, fold: bool = False, force: bool = False
) -> Path:
    """Write an adapter's file in another form and return it. See ``write_lora``."""
    return write_lora(read_lora(path), out, form, dtype=dtype, fold=fold, force=force)


def write_lora(
    lora: LoraFile,
    out: Path,
    form: Form | None = None,
    *,
    dtype: Dtype | None = None,
    fold: bool = False,
    force: bool = False,
) -> Path:
    """Write an adapter and return its file, or PEFT's folder, which is there complete or not at all.

    Args:
        out: A ``.safetensors`` file; of PEFT's form, a folder.
        form: By default that in which it was read.
        dtype: By default that of the file that it came from.
        fold: diffusers: multiply the scale into B, for readers that know no header.
        force: Write over a file that is there.

    Raises:
        BadInput: The file is there, no program reads this adapter in this form, or its numbers do not fit the
            type.
    """
    form = form or lora.form
    check_target(out, form, force=force)
    if problem := _unreadable(lora, form):
        raise BadInput(f"adapter {lora.path}: {problem[0]}", problem[1])
    modules = tuple(_folded(module) for module in lora.modules) if fold else lora.modules
    said = {k: v for k, v in lora.metadata.items() if k not in _OF_THE_FORM and not k.startswith(_HASHES)}
    dtype, family = dtype or _name_of(lora.dtype), lora.family or "sd1"
    configs = {} if form == "kohya" else configs_of(modules, told_in_header(lora.path, lora.metadata))
    if form == "peft":
        return write_folder(out, modules, configs, family, header=said, dtype=dtype)
    tensors, header = _in_form(modules, form, family, configs)
    cast = in_dtype(tensors, dtype)
    if form == "kohya" and said:
        said["sshs_model_hash"] = hash_of_data(cast)
    return put(out.parent, out.name, to_bytes(cast, {**said, **header}))


def check_target(out: Path, form: Form | None, *, force: bool) -> None:
    """Refuse to write where something is.

    Args:
        form: None where it is not known yet: then only what no form allows is refused.

    Raises:
        BadInput: ``out`` is there and ``force`` is not given, or it is no name for this form.
    """
    if form == "peft" and out.suffix == ".safetensors":
        raise BadInput(f"--out {out}: PEFT's form is a folder, not a file")
    if form not in ("peft", None) and (out.suffix != ".safetensors" or out.is_dir()):
        raise BadInput(f"--out {out}: expected the name of a .safetensors file")
    if out.exists() and not force:
        raise BadInput(f"{out} is there already", "give --force to write over it, or another --out")
    if form == "peft":
        check_replaceable(out)


def configs_of(modules: Sequence[AdaptedModule], told: Mapping[str, Told]) -> dict[str, Told]:
    """Return, by network, the configuration from which PEFT rebuilds modules: see ``methods.configs``.

    Args:
        told: What their file says. Of LoKr, only that tells how PEFT split the sizes.
    """
    found: dict[str, Told] = {}
    for network in sorted({module.network for module in modules}):
        own = {m.name.removeprefix(TEXT_LEVEL): m for m in modules if m.network == network}
        kind = next(iter(own.values())).kind
        says = told_by_module(
            kind.upper(),
            {name: module.rank for name, module in own.items()},
            {name: module.scale * module.rank for name, module in own.items()},
        )
        match kind:
            case "lora":
                has_magnitudes = any(module.magnitude is not None for module in own.values())
                says |= {"use_dora": has_magnitudes, "use_rslora": False}
            case "loha":
                says |= {"use_effective_conv2d": any("hada_t1" in m.tensors for m in own.values())}
            case "lokr":
                split = ("decompose_both", "decompose_factor")
                says |= {key: value for key, value in told.get(network, {}).items() if key in split}
        found[network] = says
    return found


def _in_form(
    modules: Sequence[AdaptedModule], form: Form, family: str, configs: Mapping[str, Told]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    if form == "kohya":
        return kohya_tensors(modules, family), {}
    if form == "ours":
        tensors = {
            f"{m.network}.{name_in_model(m, family)}.{part}": tensor
            for m in modules
            for part, tensor in m.tensors.items()
        }
        return tensors, metadata_of(modules[0].kind, configs)
    told = {
        f"{network}.{key}": value
        for network, config in configs.items()
        for key, value in config.items()
        if key != "peft_type"
    }
    return diffusers_tensors(modules), {"format": "pt", ADAPTER_METADATA: json.dumps(told, sort_keys=True)}


def _unreadable(lora: LoraFile, form: Form) -> tuple[str, str] | None:
    """Say why no program would read it in this form, and what to do instead."""
    if form == "diffusers" and lora.kind != "lora":
        return f"diffusers loads no {lora.kind}", "convert it --to kohya, the form of LyCORIS"
    if form == "kohya" and lora.family == "sd3":
        return "kohya's names for SD3 are those of another implementation", "convert it --to diffusers"
    if form in _PEFTS and lora.kind == "lokr" and lora.form not in _PEFTS:
        return "its LoKr factors say nothing of how PEFT split the sizes", "leave it in LyCORIS' form: kohya"
    if form != "kohya" and lora.has_magnitudes:
        bare = next((m for m in lora.modules if m.magnitude is None), None)
        if bare is not None:
            return f"{bare.network}.{bare.name} has no magnitudes, others have", "leave it in kohya's form"
    return None


def _folded(module: AdaptedModule) -> AdaptedModule:
    if module.kind != "lora":
        return module
    up = module.tensors["lora_B.weight"] * module.scale
    return replace(module, scale=1.0, tensors={**module.tensors, "lora_B.weight": up})


def _name_of(dtype: torch.dtype) -> Dtype:
    return next((name for name, kind in DTYPES.items() if kind is dtype), "fp32")


def agreed(headers: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return what several headers say alike."""
    first, *others = headers
    return {key: value for key, value in first.items() if all(h.get(key) == value for h in others)}
