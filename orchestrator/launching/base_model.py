"""What can be known of a base model without loading it: where it lies, of what family it is, what it can do.

Reads the JSON files of a local model only; torch is not imported. What the weights say is found by the
trainer, before its first step.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from trainer.config import Base
from trainer.config.families import CONVOLUTIONAL, DENOISERS, FAMILIES, FLOW_MATCHING, SKIPPING_LAYERS

from ..errors import Problem, shown

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_CLIP_SKIP, _PREDICTION, _ZERO_SNR = "base.clip_skip", "base.prediction_type", "base.zero_terminal_snr"


def base_model_problems(bases: Iterable[Base]) -> Iterator[Problem]:
    """Yield what is wrong with the base models, or worth a warning."""
    read = (
        *("model", "revision", "prediction_type", "zero_terminal_snr", "clip_skip"),
        *("min_timestep", "max_timestep", "hollow", "control"),
    )
    for base in {tuple(getattr(base, key) for key in read): base for base in bases}.values():
        yield from _model(base)
        yield from _control(base)


def _control(base: Base) -> Iterator[Problem]:
    if base.control and Path(base.control.model).is_absolute() and not Path(base.control.model).is_dir():
        hint = "a diffusers folder of a ControlNet; relative paths start at the folder of the sweep file"
        message = f"ControlNet {base.control.model} is no folder"
        yield Problem("E2301", message, "base.control.model", hint)


def _model(base: Base) -> Iterator[Problem]:
    model, path = base.model, Path(base.model)
    if path.suffix in _PICKLES:
        message = f"base model {model} may contain code that runs when it is loaded"
        yield Problem("E2302", message, "base.model", "convert it to .safetensors first")
    elif path.is_absolute():
        yield from _local_model(base, path)
    elif path.suffix == ".safetensors" or not _HUB_ID.fullmatch(model) or len(model) > 96:
        hint = "a local path, or a hub id such as owner/name"
        yield Problem(
            "E2301", f"base model {shown(model)} is neither a file nor a hub id", "base.model", hint
        )
    elif base.revision is None:
        message = f"base model {model} is not pinned: its owner can change what is trained"
        yield Problem("W2306", message, "base.revision", "set it to a commit of the repository")


def _local_model(base: Base, path: Path) -> Iterator[Problem]:
    if not path.exists():
        hint = "relative paths start at the folder of the sweep file"
        yield Problem("E2301", f"base model {path} does not exist", "base.model", hint)
        return
    if path.is_file() and path.suffix != ".safetensors":
        yield Problem("E2302", f"base model {path} is not a .safetensors file", "base.model")
        return
    described = path.with_suffix("") if path.is_file() else path
    if path.is_file() and not described.is_dir():
        return  # the trainer asks the hub for the configuration of its family
    kind = _json(described / "model_index.json").get("_class_name")
    if kind not in FAMILIES:
        what = f"is a {kind}" if kind else "has no readable model_index.json: it is not a diffusers model"
        yield Problem(
            "E2303",
            f"base model {described} {what}",
            "base.model",
            f"the trainer loads {', '.join(FAMILIES)}",
        )
        return
    denoiser = DENOISERS.get(kind, "unet")
    if path.is_dir() and not any((path / denoiser).glob("*.safetensors")):
        message = f"base model {path} has no safetensors weights in {denoiser}/"
        yield Problem("E2304", message, "base.model", "save it with safe_serialization=True")
    schedule = _json(described / "scheduler" / "scheduler_config.json")
    yield from _asked(base, kind, schedule.get("prediction_type") if path.is_dir() else None)
    levels = schedule.get("num_train_timesteps")
    if isinstance(levels, int):
        for key, least in (("min_timestep", base.min_timestep + 1), ("max_timestep", base.max_timestep or 1)):
            if least > levels:
                message = f"{base.model} has {levels} timesteps, 0 to {levels - 1}"
                yield Problem("E2305", message, f"base.{key}", f"at most {levels - (key == 'min_timestep')}")


def _asked(base: Base, kind: str, stated: str | None) -> Iterator[Problem]:
    """Yield what the run asks of its model that such a model does not do."""
    if base.clip_skip != 1 and kind not in SKIPPING_LAYERS:
        message = f"a {kind} was trained on one fixed layer of each of its text encoders"
        hint = "leave clip_skip out; it is for Stable Diffusion 1.x and 2.x"
        yield Problem("E2305", message, _CLIP_SKIP, hint)
    for key in ("hollow", "control") if kind not in CONVOLUTIONAL else ():
        if getattr(base, key) is not None:
            message = f"a {kind} has no UNet, which base.{key} needs"
            yield Problem("E2305", message, f"base.{key}", f"leave {key} out")
    if kind in FLOW_MATCHING:
        message = f"a {kind} is trained by flow matching: one kind of prediction, and pure noise at the end"
        for key, given in ((_PREDICTION, base.prediction_type), (_ZERO_SNR, base.zero_terminal_snr)):
            if given:
                yield Problem("E2305", message, key, f"leave {key.removeprefix('base.')} out")
        return
    if base.prediction_type and stated and base.prediction_type != stated:
        message = f"{base.model} says of itself that it predicts {stated}, not {base.prediction_type}"
        hint = "leave prediction_type out, or take a model of that kind"
        yield Problem("E2305", message, _PREDICTION, hint)
    elif base.zero_terminal_snr and (base.prediction_type or stated or "epsilon") != "v_prediction":
        message = "an image cannot be told from a prediction of the noise in pure noise"
        hint = "take a model with v-prediction, or noise_offset for very dark and bright images"
        yield Problem("E2305", message, _ZERO_SNR, hint)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
