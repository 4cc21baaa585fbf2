"""Writes a LoRA as others name it. Pure but for reading the checkpoint and writing the file.

Both forms say the true alpha: diffusers in the header, without which it assumes alpha = rank, and kohya in
one scalar per module. Metadata is minimal: neither captions nor paths of the training machine leave it.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Literal

import torch
from torch import Tensor

from storage.local import temporary_dir

from ..config import RunSpec
from ..errors import BadInput
from ..families.sd1 import TARGETS
from ..snapshot import read_adapter, read_progress
from ..tensor_file import to_bytes

Form = Literal["diffusers", "kohya"]
Dtype = Literal["fp32", "fp16", "bf16"]

DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
PREFIX = "unet."
KOHYA_PREFIX = "lora_unet_"


def export_adapter(
    checkpoint_dir: Path, spec: RunSpec, target: Path, to: Form, dtype: Dtype = "fp32"
) -> Path:
    """Write a verified checkpoint's LoRA into the folder ``target`` and return the file.

    The file appears complete or not at all, and replaces one of the same name.

    Raises:
        BadCheckpoint: The checkpoint is damaged, or its adapter holds NaN.
        BadInput: ``target`` cannot be written, or ``dtype`` cannot hold the adapter's numbers.
    """
    step = read_progress(checkpoint_dir).step
    tensors = _cast(read_adapter(checkpoint_dir), dtype)
    match to:
        case "diffusers":
            name, body = DIFFUSERS_NAME, to_bytes(tensors, diffusers_metadata(spec))
        case "kohya":
            name = f"{target.name}.safetensors"
            body = _kohya_bytes(kohya_tensors(tensors, spec.base.lora_alpha), spec, target.name, step)
    try:
        temporary = temporary_dir(target)
        (temporary / name).write_bytes(body)
        (temporary / name).replace(target / name)
        temporary.rmdir()
    except OSError as error:
        raise BadInput(f"{target / name} cannot be written: {error.strerror}") from error
    return target / name


def diffusers_metadata(spec: RunSpec) -> dict[str, str]:
    """The header by which diffusers rebuilds the adapter with its true alpha."""
    config = {
        "r": spec.base.rank,
        "lora_alpha": spec.base.lora_alpha,
        "target_modules": sorted(TARGETS["attention"]),
    }
    prefixed = {f"{PREFIX}{name}": value for name, value in config.items()}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(prefixed, sort_keys=True)}


def kohya_tensors(tensors: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Rename PEFT's tensors as kohya's scripts do, and add an alpha per module."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, rest = name.removeprefix(PREFIX).rpartition(".lora_")
        kohya_module = KOHYA_PREFIX + module.replace(".", "_")
        part = {"A.weight": "lora_down", "B.weight": "lora_up"}[rest]
        renamed[f"{kohya_module}.{part}.weight"] = tensor
        renamed[f"{kohya_module}.alpha"] = torch.tensor(alpha)  # fp32: a rounded scale scales everything
    return renamed


def kohya_metadata(spec: RunSpec, name: str, step: int) -> dict[str, str]:
    """What A1111 and model managers read: the network, the base, the resolution, and how to use it."""
    base = spec.base
    metadata = {
        "ss_output_name": name,
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_sd_model_name": PurePath(base.model).name,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(base.rank),
        "ss_network_alpha": str(base.lora_alpha),
        "ss_resolution": f"({base.resolution}, {base.resolution})",
        "ss_clip_skip": "None",
        "ss_steps": str(step),
        "ss_seed": str(base.seed),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "modelspec.resolution": f"{base.resolution}x{base.resolution}",
    }
    if base.prediction_type:
        metadata["modelspec.prediction_type"] = {"epsilon": "epsilon", "v_prediction": "v"}[
            base.prediction_type
        ]
    if spec.dataset.trigger:
        metadata["modelspec.trigger_phrase"] = spec.dataset.trigger
    return metadata


def _kohya_bytes(tensors: dict[str, Tensor], spec: RunSpec, name: str, step: int) -> bytes:
    """The file, with the hash by which A1111 recognises a network whatever its header says."""
    bare = to_bytes(tensors, {})
    data = bare[8 + int.from_bytes(bare[:8], "little") :]
    metadata = kohya_metadata(spec, name, step)
    return to_bytes(tensors, {**metadata, "sshs_model_hash": hashlib.sha256(data).hexdigest()})


def _cast(tensors: Mapping[str, Tensor], dtype: Dtype) -> dict[str, Tensor]:
    cast = {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}
    if odd := [name for name, tensor in cast.items() if not torch.isfinite(tensor).all()]:
        raise BadInput(f"{odd[0]} has numbers too large for {dtype}", "export as bf16 or fp32")
    return cast
