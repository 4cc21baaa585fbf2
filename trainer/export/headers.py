"""What the header of an exported file says. Pure.

    what readers need   diffusers: each network's configuration, with the true alphas
    minimal             also the base model, the network, how to use it: ``ss_*`` and ``modelspec.*``
    full                also the run's whole spec, with captions and paths of the machine that it names

Minimal, the default, tells neither captions nor paths of the training machine.
"""

import json
from pathlib import Path, PurePath
from typing import Any, Literal

from ..config import Base, RunSpec
from ..methods.peft_files import ADAPTER_METADATA
from .trained import Trained

Amount = Literal["minimal", "full", "none"]

BASE_MODEL = "orchestrate.base_model"
"""A hub id, or the name of a local file or folder."""
BASE_REVISION = "orchestrate.base_revision"
BASE_DIGEST = "orchestrate.base_sha256"
"""Of a local model, as ``trainer.model_files`` computes it."""
MERGED = "orchestrate.merged_adapters"
"""What was merged into the base before training, and belongs to it when the adapter is used."""
SPEC = "orchestrate.spec"

_KOHYA_VERSION = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0", "sd3": "sd3_medium"}
_ARCHITECTURE = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sd3": "stable-diffusion-3-medium",
}
_OF_ARCHITECTURE = {
    "hypernetwork": "/hypernetwork",
    "full": "",
    "textual_inversion": "/textual-inversion",
}
_PREDICTION = {"epsilon": "epsilon", "v_prediction": "v"}


def diffusers_header(trained: Trained, *, fold: bool = False) -> dict[str, str]:
    """Return that by which diffusers rebuilds the adapter with its true alphas.

    Args:
        fold: The scale is in the tensors already.
    """
    told: dict[str, Any] = {}
    for network, config in trained.configs.items():
        given = {key: value for key, value in config.items() if key != "peft_type"}
        if fold:
            given |= {"lora_alpha": config["r"], "use_rslora": False}
            given |= {"alpha_pattern": dict(config.get("rank_pattern", {}))}
        told |= {f"{network}.{key}": value for key, value in given.items()}
    return {"format": "pt", ADAPTER_METADATA: json.dumps(told, sort_keys=True)}


def description(trained: Trained, name: str, amount: Amount) -> dict[str, str]:
    """Return what model managers, web interfaces and ``orchestrate generate`` read."""
    if amount == "none":
        return {}
    said = {**_base(trained.spec), **_kohya(trained, name), **_modelspec(trained, name)}
    return {**said, SPEC: trained.spec.model_dump_json()} if amount == "full" else said


def is_local(model: str) -> bool:
    """Whether a base model is a file or folder, and no hub id."""
    return model.startswith((".", "/", "~")) or Path(model).expanduser().exists()


def public_name(model: str) -> str:
    """Return a hub id, or of a local model its name without the path."""
    return PurePath(model).name if is_local(model) else model


def merged_names(spec: RunSpec) -> str:
    """Return what was merged into the base, as ``name × weight``; empty if nothing was."""
    return ", ".join(f"{PurePath(one.path).name} × {one.weight:g}" for one in spec.base.merged_adapters)


def described(trained: Trained) -> str:
    """Return in a few words what was trained."""
    base = trained.spec.base
    match trained.kind:
        case "hypernetwork":
            layers = ", ".join(f"{multiple:g}" for multiple in base.hypernetwork_layers)
            return f"hypernetwork, layers {layers}, {base.hypernetwork_activation}"
        case "textual_inversion":
            return "textual inversion of " + ", ".join(token.token for token in base.tokens)
        case "full":
            return "full fine-tuning" + (", text encoder too" if base.train_text_encoder else "")
        case adapter:
            return f"{adapter} of rank {base.rank}, alpha {base.lora_alpha:g}"


def _base(spec: RunSpec) -> dict[str, str]:
    base = spec.base
    said = {
        BASE_MODEL: public_name(base.model),
        BASE_REVISION: base.revision,
        BASE_DIGEST: base.digest,
        MERGED: merged_names(spec),
    }
    return {key: value for key, value in said.items() if value}


def _kohya(trained: Trained, name: str) -> dict[str, str]:
    base = trained.spec.base
    is_v = trained.prediction_type == "v_prediction"
    version = _KOHYA_VERSION[trained.family]
    said = {
        "ss_output_name": name,
        "ss_base_model_version": f"{version}_v" if is_v and trained.family in ("sd1", "sd2") else version,
        "ss_v2": str(trained.family == "sd2"),
        "ss_sd_model_name": PurePath(base.model).name,
        "ss_resolution": f"({base.resolution}, {base.resolution})",
        "ss_clip_skip": str(base.clip_skip) if base.clip_skip > 1 else "None",
        "ss_zero_terminal_snr": str(base.zero_terminal_snr),
        "ss_steps": str(trained.step),
        "ss_seed": str(base.seed),
    }
    return said | _network(base) if trained.modules else said


def _network(base: Base) -> dict[str, str]:
    arguments: dict[str, Any] = {}
    if base.conv_rank:
        arguments |= {"conv_dim": base.conv_rank, "conv_alpha": base.lora_conv_alpha}
    if own := base.adapter != "lora" or base.use_dora:
        arguments |= {"algo": base.adapter, **({"dora_wd": True} if base.use_dora else {})}
    said = {
        "ss_network_module": "lycoris.kohya" if own else "networks.lora",
        "ss_network_dim": str(base.rank),
        "ss_network_alpha": str(base.lora_alpha),
    }
    return said | ({"ss_network_args": json.dumps(arguments)} if arguments else {})


def _modelspec(trained: Trained, name: str) -> dict[str, str]:
    """Stability's model metadata standard 1.0.1, as kohya's scripts fill it in."""
    base, trigger = trained.spec.base, trained.spec.dataset.trigger
    architecture = _ARCHITECTURE[trained.family]
    if trained.family == "sd2" and trained.prediction_type == "v_prediction":
        architecture = "stable-diffusion-v2-768-v"
    said = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture + _OF_ARCHITECTURE.get(trained.kind, "/lora"),
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "modelspec.resolution": f"{base.resolution}x{base.resolution}",
    }
    if trained.prediction_type in _PREDICTION:
        said["modelspec.prediction_type"] = _PREDICTION[trained.prediction_type]
    if trigger:
        said["modelspec.trigger_phrase"] = trigger
    return said
