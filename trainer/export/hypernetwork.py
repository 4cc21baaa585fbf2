"""A hypernetwork as others read it, proven by loading it anew.

a1111, comfyui, kohya   NAME.pt                           models/hypernetworks
hf                      NAME-hypernetwork.safetensors     read by ``orchestrate generate``
dir                     both
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import RunSpec
from ..errors import BadInput
from ..families import load_family
from ..methods.hypernetwork import Hypernetwork
from ..methods.hypernetwork_files import (
    A1111_SUFFIX,
    Layers,
    a1111_bytes,
    layers_of,
    put_onto,
    read_hypernetwork,
)
from ..tensor_file import to_bytes
from .files import DTYPES, Dtype, in_dtype, put
from .headers import Amount, description, public_name
from .trained import Trained, in_fp32, on_base, outputs_of, trained_part
from .verify import EPSILON, ExportFailed, compare_outputs

_FORMS: dict[str, tuple[str, ...]] = {
    "a1111": (A1111_SUFFIX,),
    "comfyui": (A1111_SUFFIX,),
    "kohya": (A1111_SUFFIX,),
    "hf": (".safetensors",),
    "dir": (A1111_SUFFIX, ".safetensors"),
}


@dataclass(frozen=True, slots=True)
class TrainedHypernetwork:
    """What is exported, and what every exported file must give back."""

    trained: Trained
    made: Hypernetwork

    @property
    def layers(self) -> dict[str, Layers]:
        return layers_of(self.made)


def trained_hypernetwork(checkpoint_dir: Path, spec: RunSpec) -> TrainedHypernetwork:
    """Load the hypernetwork of a verified checkpoint on its base, in fp32, without what else was trained.

    Raises:
        BadCheckpoint: The checkpoint is damaged, or does not belong to this spec.
        BadInput, BaseUnavailable: The base cannot be loaded.
    """
    with on_base(checkpoint_dir, spec, Hypernetwork) as (family, (made,)):
        return TrainedHypernetwork(trained_part(spec, "hypernetwork", checkpoint_dir, family), made)


def write_hypernetwork(
    own: TrainedHypernetwork, folder: Path, to: str, *, name: str, dtype: Dtype, metadata: Amount
) -> list[Path]:
    """Write it into a folder for those who read it there, and return the files.

    Raises:
        BadInput: Nobody reads one there, ``dtype`` cannot hold its numbers, or a file cannot be written.
    """
    if to not in _FORMS:
        raise BadInput(
            f"{to} loads no hypernetwork",
            "export it with --to a1111, which ComfyUI reads too, or draw with orchestrate generate",
        )
    tensors = in_dtype({key: p.data for key, p in own.made.parameters.items()}, dtype)
    written = []
    for suffix in _FORMS[to]:
        if suffix == A1111_SUFFIX:
            base, step = public_name(own.trained.spec.base.model), own.trained.step
            body = a1111_bytes(own.made, DTYPES[dtype], name=name, step=step, base=base)
            written.append(put(folder, name + suffix, body))
        else:
            header = {**own.made.metadata(), **description(own.trained, name, metadata)}
            written.append(put(folder, f"{name}-hypernetwork{suffix}", to_bytes(tensors, header)))
    return written


def verify_hypernetwork(path: Path, own: TrainedHypernetwork, dtype: Dtype) -> dict[str, Any]:
    """Put a written file onto its base, loaded anew, and return what was found.

    Raises:
        ExportFailed: It does not load, or a number or a prediction differs.
    """
    family = load_family(in_fp32(own.trained.spec).base)
    try:
        loaded = put_onto(read_hypernetwork(path), family, "exported", path)
    except BadInput as problem:
        raise ExportFailed(str(problem)) from problem
    for key, layers in layers_of(loaded).items():
        for got, wanted in zip(layers, own.layers[key], strict=True):
            if not all(torch.equal(a, b.to(DTYPES[dtype]).float()) for a, b in zip(got, wanted, strict=True)):
                raise ExportFailed(f"{path}: {key} differs from the checkpoint")
    worst = compare_outputs(path, outputs_of(family), own.trained.outputs, EPSILON[DTYPES[dtype]])
    return {
        "networks": len(own.made.networks),
        "dtype": dtype,
        "size_bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "max_prediction_error": worst,
    }
