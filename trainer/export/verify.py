"""Proves that an exported file loads, by loading it as a user would.

The base model is loaded anew through diffusers, the file with ``load_lora_weights``; then every module's
``alpha / r * B A`` and the prediction for one fixed noisy latent are compared with the checkpoint's.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from safetensors import SafetensorError
from torch import Tensor

from ..config import RunSpec
from ..errors import TrainerError
from ..families.source import load_pipeline
from ..randomness import generator
from ..sample import adapted_family
from ..snapshot import read_adapter
from ..tensor_file import read
from .files import DTYPES, KOHYA_PREFIX, PREFIX

_EPSILON = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Relative error of a prediction that rounding the factors to a type, and another order of sums, cause."""


class ExportFailed(TrainerError):
    """The written file does not give back the adapter it was written from."""


def verify_export(path: Path, spec: RunSpec, checkpoint_dir: Path) -> dict[str, Any]:
    """Load an exported file into a fresh pipeline and return what was found.

    Returns:
        ``modules``, ``rank``, ``alpha``, ``dtype``, ``size_bytes``, ``sha256``, and the largest errors
        against the checkpoint, ``max_weight_error`` relative to the adapter's largest weight and
        ``max_prediction_error`` relative to the largest number predicted.

    Raises:
        ExportFailed: It does not load, a key is missing or left over, alpha or a weight differs.
    """
    adapter = read_adapter(checkpoint_dir)
    dtype = _check_file(path, spec, adapter)
    plain = spec.model_copy(update={"base": spec.base.model_copy(update={"mixed_precision": "no"})})
    expected = _predict(adapted_family(plain, checkpoint_dir).denoiser)
    unet = _load(path, spec)
    layers = {name: layer for name, layer in unet.named_modules() if hasattr(layer, "lora_A")}
    weight_error = _compare_weights(path, layers, adapter, spec, dtype)
    error = _relative(_predict(unet), expected)
    if not error <= _EPSILON[dtype]:
        raise ExportFailed(f"{path}: predictions differ from the checkpoint's by {error:.1e}")
    return {
        "modules": len(layers),
        "rank": spec.base.rank,
        "alpha": spec.base.lora_alpha,
        "dtype": next(name for name, kind in DTYPES.items() if kind is dtype),
        "size_bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "max_weight_error": weight_error,
        "max_prediction_error": error,
    }


def _check_file(path: Path, spec: RunSpec, adapter: dict[str, Tensor]) -> torch.dtype:
    """Check names, types and numbers of the file itself; return the type of its tensors."""
    try:
        tensors, metadata = read(path)
    except (OSError, SafetensorError) as error:
        raise ExportFailed(f"{path}: {error}") from error
    dtypes = {tensor.dtype for name, tensor in tensors.items() if not name.endswith(".alpha")}
    if len(dtypes) != 1 or not dtypes <= set(_EPSILON):
        raise ExportFailed(f"{path}: tensors of the types {sorted(map(str, dtypes))}, expected one")
    if odd := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise ExportFailed(f"{path}: {odd[0]} holds NaN or infinity")
    if any(name.startswith(KOHYA_PREFIX) for name in tensors):
        alphas = {float(tensor) for name, tensor in tensors.items() if name.endswith(".alpha")}
        count = len(adapter) // 2 * 3
    else:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        alphas = {float(config.get(f"{PREFIX}lora_alpha", math.nan))}
        count = len(adapter)
    if not all(math.isclose(alpha, spec.base.lora_alpha, rel_tol=1e-6) for alpha in alphas):
        raise ExportFailed(f"{path}: alpha is {sorted(alphas)}, expected {spec.base.lora_alpha}")
    if len(tensors) != count:
        raise ExportFailed(f"{path}: {len(tensors)} tensors, expected {count}")
    return dtypes.pop()


def _load(path: Path, spec: RunSpec) -> Any:
    pipeline = load_pipeline(spec.base, StableDiffusionPipeline, None)
    try:
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    except (ValueError, KeyError, RuntimeError, TypeError) as error:
        raise ExportFailed(f"{path}: diffusers does not load it: {error}") from error
    return pipeline.unet.float().eval()


def _compare_weights(
    path: Path, layers: dict[str, Any], adapter: dict[str, Tensor], spec: RunSpec, dtype: torch.dtype
) -> float:
    modules = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in adapter}
    if layers.keys() != modules:
        odd = sorted(layers.keys() ^ modules)
        raise ExportFailed(
            f"{path}: {len(odd)} modules are missing or left over after loading, e.g. {odd[0]}"
        )
    scale, worst, largest = spec.base.lora_alpha / spec.base.rank, 0.0, 1e-12
    for name, layer in layers.items():
        (loaded,) = layer.lora_A
        if any(weight.is_meta for weight in layer.parameters()):
            raise ExportFailed(f"{path}: {name} finds no tensor of its own in the file")
        got = layer.scaling[loaded] * _product(layer.lora_A[loaded].weight, layer.lora_B[loaded].weight)
        a, b = (adapter[f"{PREFIX}{name}.lora_{part}.weight"] for part in "AB")
        expected = scale * _product(a, b)
        error = (got - expected).abs()
        if not (error <= scale * rounding_error(a, b, dtype)).all():
            relative = _relative(got, expected)
            raise ExportFailed(f"{path}: {name} differs from the checkpoint by {relative:.1e} of its weights")
        worst, largest = max(worst, float(error.max())), max(largest, float(expected.abs().max()))
    return worst / largest


def rounding_error(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return how far each element of ``B A`` may be off because both were rounded to a type.

    Rounding moves a number by up to half the distance to its neighbour. Near zero that distance is fixed: the
    ``B`` of a layer that has hardly been trained may lie there, and of it fp16 keeps few digits or none.
    """
    a_RI, b_OR = a.detach().float().cpu().flatten(1).abs(), b.detach().float().cpu().flatten(1).abs()
    single, kind = torch.finfo(torch.float32), torch.finfo(dtype)
    # Two sums in different orders; the file's own type is exact.
    bound = (len(a) + 2) * single.eps * (b_OR @ a_RI) + single.tiny
    if dtype is not torch.float32:
        off_a, off_b = ((kind.eps * x).clamp_min(kind.tiny * kind.eps) / 2 for x in (a_RI, b_OR))
        bound += off_b @ (a_RI + off_a) + b_OR @ off_a
    return bound


def _product(a: Tensor, b: Tensor) -> Tensor:
    return b.detach().float().cpu().flatten(1) @ a.detach().float().cpu().flatten(1)


def _relative(got: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest number expected."""
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


@torch.no_grad()
def _predict(unet: Any) -> Tensor:
    unet.cpu().eval()
    noisy = torch.randn((1, 4, 8, 8), generator=generator(0, "verify latents", 0))
    text = torch.randn((1, 77, unet.config.cross_attention_dim), generator=generator(0, "verify text", 0))
    predicted: Tensor = unet(noisy, torch.tensor([500]), encoder_hidden_states=text).sample
    return predicted
