"""A fully finetuned model: the base's pipeline with the trained weights in it, as a diffusers folder.

The other parts are the base's own, with whatever was merged into it; the safety checker is left out. The
folder is proven by loading it anew: every trained weight, and in fp32 the prediction and what the text
encoders say, are those of the checkpoint.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler

from ..config import Base, RunSpec
from ..errors import BadInput
from ..families import load_family
from ..families.source import load_pipeline
from ..families.stable_diffusion import NO_SIGNAL
from ..sample import trained_on_base
from ..snapshot import read_adapter
from .files import DTYPES, Dtype
from .modules import networks
from .pipeline_folder import INDEX, check_replaceable, write_pipeline
from .trained import Trained, in_fp32, outputs_of, trained_part
from .verify import SUMS, ExportFailed, compare_outputs

NO_SINGLE_FILE = (
    "diffusers writes whole models as folders only, and not as one file for A1111",
    "export it with --to diffusers: ComfyUI's DiffusersLoader reads such a folder, and diffusers' "
    "scripts/convert_diffusers_to_original_stable_diffusion.py (…_sdxl.py) makes one file of it",
)


def trained_whole(checkpoint_dir: Path, spec: RunSpec) -> Trained:
    """Load a verified checkpoint of a full fine-tuning, in fp32.

    Raises:
        BadCheckpoint: The checkpoint is damaged, or does not belong to this spec.
        BadInput, BaseUnavailable: The base cannot be loaded.
    """
    family, _ = trained_on_base(in_fp32(spec).base, checkpoint_dir)
    return trained_part(spec, "full", checkpoint_dir, family)


def write_whole(trained: Trained, checkpoint_dir: Path, folder: Path, dtype: Dtype) -> Path:
    """Write the whole model as a diffusers folder, replacing one that is there, and return the folder.

    Raises:
        BadInput: Something else is there, or ``dtype`` cannot hold a weight.
    """
    check_replaceable(folder)
    base = trained.spec.base
    pipeline = load_pipeline(base)
    for name, tensor in read_adapter(checkpoint_dir).items():
        network, _, inner = name.partition(".")
        getattr(pipeline, network).get_parameter(inner).data = tensor
    pipeline.scheduler = _schedule(pipeline.scheduler, base)
    write_pipeline(pipeline.to(DTYPES[dtype]), folder)
    return folder


def verify_whole(folder: Path, trained: Trained, checkpoint_dir: Path, dtype: Dtype) -> dict[str, Any]:
    """Load a written folder as diffusers does and return what was found.

    Returns:
        ``tensors``, ``dtype``, ``size_bytes``, and ``max_prediction_error`` relative to the largest number
        predicted; with less than fp32 it is what rounding the weights does.

    Raises:
        ExportFailed: It does not load, or a weight or a prediction differs.
    """
    try:
        family = load_family(as_base(folder, trained.spec.base))
    except BadInput as problem:
        raise ExportFailed(str(problem)) from problem
    weights = {
        f"{prefix}.{name}": parameter
        for prefix, network in networks(family).items()
        for name, parameter in network.named_parameters()
    }
    expected = read_adapter(checkpoint_dir)
    for name, tensor in expected.items():
        if name not in weights or not torch.equal(weights[name].cpu(), tensor.to(DTYPES[dtype]).float()):
            raise ExportFailed(f"{folder}: {name} differs from the checkpoint")
    allowed = SUMS if dtype == "fp32" else torch.inf  # how much rounding all weights does, nobody knows
    error = compare_outputs(folder, outputs_of(family), trained.outputs, allowed)
    return {
        "tensors": len(expected),
        "dtype": dtype,
        "size_bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "max_prediction_error": error,
    }


def as_base(folder: Path, base: Base | None = None) -> Base:
    """Return a folder as a base model, used as in the run that made it."""
    told = {"clip_skip": base.clip_skip} if base else {}
    return Base(model=str(folder), **told)


def is_whole(path: Path) -> bool:
    return (path / INDEX).is_file()


def _schedule(schedule: Any, base: Base) -> Any:
    """The model's noise levels, and what the run said of them, so that whoever loads it need not know."""
    said: dict[str, Any] = {"prediction_type": base.prediction_type} if base.prediction_type else {}
    if base.zero_terminal_snr:  # not every scheduler knows of it
        return DDIMScheduler.from_config({**schedule.config, **said, **NO_SIGNAL})
    return type(schedule).from_config({**schedule.config, **said}) if said else schedule
