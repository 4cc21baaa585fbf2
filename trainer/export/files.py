"""Writes an adapter's weights as others read them. The file appears complete or not at all.

diffusers   <folder>/pytorch_lora_weights.safetensors   with each network's configuration in the header
kohya       <folder>/<name>.safetensors                 with one alpha per module

A file is a function of the checkpoint, the spec and the options: the same again gives the same bytes.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from storage.local import temporary_dir

from ..errors import BadInput
from ..tensor_file import to_bytes
from .headers import Amount, description, diffusers_header
from .naming import diffusers_tensors, kohya_tensors
from .trained import Trained

Form = Literal["diffusers", "kohya"]
Dtype = Literal["fp32", "fp16", "bf16"]

DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"


def write_weights(
    trained: Trained,
    folder: Path,
    form: Form,
    *,
    dtype: Dtype = "fp32",
    name: str | None = None,
    metadata: Amount = "minimal",
    fold: bool = False,
) -> Path:
    """Write the adapter into a folder and return the file, which replaces one of the same name.

    Args:
        name: What web interfaces call it; by default as the folder.
        fold: diffusers: multiply the scale into the tensors, for readers that know no header.

    Raises:
        BadInput: The folder cannot be written, ``dtype`` cannot hold the adapter's numbers, or no program
            reads this adapter in this form.
    """
    name = name or folder.name
    if problem := unreadable(trained, form):
        raise BadInput(*problem)
    if form == "diffusers":
        tensors = diffusers_tensors(trained.modules, fold=fold)
        header = {**diffusers_header(trained, fold=fold), **description(trained, name, metadata)}
        return put(folder, DIFFUSERS_NAME, to_bytes(in_dtype(tensors, dtype), header))
    cast = in_dtype(kohya_tensors(trained.modules, trained.family), dtype)
    header = description(trained, name, metadata)
    if header:
        header["sshs_model_hash"] = hash_of_data(cast)
    return put(folder, f"{name}.safetensors", to_bytes(cast, header))


def unreadable(trained: Trained, form: Form) -> tuple[str, str] | None:
    """Return why no program would read a file of this form, and what to do instead; None if some do."""
    if form == "diffusers" and trained.kind != "lora":
        return f"diffusers loads no {trained.kind}", "export it with --to kohya"
    if form == "kohya" and trained.family == "sd3":
        return "kohya's names for SD3 are those of another implementation", "export it with --to diffusers"
    return None


def put(folder: Path, name: str, body: bytes) -> Path:
    """Write a file into a folder, which is made if need be.

    Raises:
        BadInput: It cannot be written.
    """
    try:
        temporary = temporary_dir(folder)
        (temporary / name).write_bytes(body)
        (temporary / name).replace(folder / name)
        temporary.rmdir()
    except OSError as error:
        raise BadInput(f"{folder / name} cannot be written: {error.strerror}") from error
    return folder / name


def hash_of_data(tensors: Mapping[str, Tensor]) -> str:
    """Return the hash by which A1111 recognises a network whatever its header says."""
    bare = to_bytes(tensors, {})
    return hashlib.sha256(bare[8 + int.from_bytes(bare[:8], "little") :]).hexdigest()


def in_dtype(tensors: Mapping[str, Tensor], dtype: Dtype) -> dict[str, Tensor]:
    """Return the tensors in a type; alphas stay fp32: a rounded scale scales everything.

    Raises:
        BadInput: A number is too large for it.
    """
    cast = {
        name: tensor if name.endswith(".alpha") else tensor.to(DTYPES[dtype])
        for name, tensor in tensors.items()
    }
    if odd := [name for name, tensor in cast.items() if not torch.isfinite(tensor).all()]:
        raise BadInput(f"{odd[0]} has numbers too large for {dtype}", "export as bf16 or fp32")
    return cast
