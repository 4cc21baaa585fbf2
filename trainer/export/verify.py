"""Proves that an exported file loads, by loading it as a user would.

The base model is loaded anew and the file put onto it: by diffusers' ``load_lora_weights`` where that reads
the form, else by our own reader. Then every module's change, every magnitude, the prediction for one fixed
noisy latent and what the text encoders say are compared with those of the checkpoint.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import TrainerError
from ..tensor_file import read
from .files import DTYPES
from .modules import AdaptedModule, adapted_modules, networks
from .reading import NotReadable, read_onto_base
from .trained import Trained, in_fp32, outputs_of

EPSILON = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Relative error of a prediction that rounding the factors to a type, and another order of sums, cause."""
SUMS = 1e-5
"""Relative error that another order of sums causes."""


class ExportFailed(TrainerError):
    """The written file does not give back the adapter it was written from."""


def verify_export(path: Path, trained: Trained) -> dict[str, Any]:
    """Put an exported file onto its base, loaded anew, and return what was found.

    Returns:
        ``modules``, ``rank``, ``alpha``, ``dtype``, ``size_bytes``, ``sha256``, and the largest errors
        against the checkpoint: ``max_weight_error`` relative to the adapter's largest change, and
        ``max_prediction_error`` relative to the largest number predicted.

    Raises:
        ExportFailed: It does not load, a module is missing or left over, an alpha or a number differs.
    """
    dtype = _check_file(path)
    try:
        family, name = read_onto_base(path, in_fp32(trained.spec).base)
    except NotReadable as problem:
        raise ExportFailed(str(problem)) from problem
    weight_error = _compare_modules(path, adapted_modules(networks(family), name), trained, dtype)
    error = compare_outputs(path, outputs_of(family), trained.outputs, EPSILON[dtype])
    return {
        "modules": len(trained.modules),
        "rank": trained.spec.base.rank,
        "alpha": trained.spec.base.lora_alpha,
        "dtype": next(name for name, kind in DTYPES.items() if kind is dtype),
        "size_bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "max_weight_error": weight_error,
        "max_prediction_error": error,
    }


def _check_file(path: Path) -> torch.dtype:
    """Check types and numbers of the file itself; return the type of its tensors."""
    try:
        tensors, _ = read(path)
    except (OSError, SafetensorError) as error:
        raise ExportFailed(f"{path}: {error}") from error
    dtypes = {tensor.dtype for name, tensor in tensors.items() if not name.endswith(".alpha")}
    if len(dtypes) != 1 or not dtypes <= set(EPSILON):
        raise ExportFailed(f"{path}: tensors of the types {sorted(map(str, dtypes))}, expected one")
    if odd := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise ExportFailed(f"{path}: {odd[0]} holds NaN or infinity")
    return dtypes.pop()


def _compare_modules(
    path: Path, loaded: tuple[AdaptedModule, ...], trained: Trained, dtype: torch.dtype
) -> float:
    got = {(module.network, module.name): module for module in loaded}
    expected = {(module.network, module.name): module for module in trained.modules}
    if odd := sorted(got.keys() ^ expected.keys()):
        named = ".".join(odd[0])
        raise ExportFailed(f"{path}: {len(odd)} modules are missing or left over after loading, e.g. {named}")
    worst, largest = 0.0, torch.finfo(torch.float32).tiny
    for place, module in expected.items():
        exact, rounded = module.change_OI(), _rounded(module, dtype)
        pairs = [(got[place].change_OI(), rounded.change_OI())]
        if rounded.magnitude is not None:
            found = got[place].magnitude
            if found is None:
                raise ExportFailed(f"{path}: {'.'.join(place)} is loaded without its magnitudes")
            pairs.append((found.float().flatten(), rounded.magnitude.flatten()))
        for has, wants in pairs:
            # A number that the file's type had to round twice, where the scale is folded in, or only once.
            allowed = max(SUMS, 0.0 if dtype is torch.float32 else 2 * torch.finfo(dtype).eps)
            if has.shape != wants.shape or not (has - wants).abs().max() <= allowed * wants.abs().max():
                raise ExportFailed(f"{path}: {'.'.join(place)} differs from the checkpoint")
        worst = max(worst, float((pairs[0][0] - exact).abs().max()))
        largest = max(largest, float(exact.abs().max()))
    return worst / largest


def _rounded(module: AdaptedModule, dtype: torch.dtype) -> AdaptedModule:
    """The module with its numbers as the file's type can hold them."""
    return replace(
        module, tensors={part: tensor.to(dtype).float() for part, tensor in module.tensors.items()}
    )


def compare_outputs(
    path: Path, got: Mapping[str, Tensor], expected: Mapping[str, Tensor], allowed: float
) -> float:
    """Return the largest error, relative to the largest number expected.

    Raises:
        ExportFailed: It is above what is allowed.
    """
    worst = 0.0
    for name, wanted in expected.items():
        error = float((got[name] - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))
        if not error <= allowed:
            raise ExportFailed(f"{path}: {name} differs from the checkpoint's by {error:.1e}")
        worst = max(worst, error)
    return worst
