"""Where a base model comes from: a hub id, a diffusers folder or a single ``.safetensors`` file.

Only safetensors weights are read and no code that ships with a model is run. Foreign errors of loading are
translated here, once.
"""

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.single_file_utils import (
    CHECKPOINT_KEY_NAMES,
    SingleFileComponentError,
    infer_diffusers_model_type,
)
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from transformers.utils import logging as transformers_logging

from ..config import Base
from ..config.families import FAMILIES, FILE_KINDS
from ..errors import BadInput, BaseUnavailable
from ..hub_transfer import broke_off
from . import family_class

WHERE = "base.model is a diffusers folder, a single .safetensors file, or a hub id such as owner/name"
NETWORKS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
"""A pipeline's networks that an adapter may be of."""
OFFLINE_CONFIG = (
    "a single file holds weights only: put a folder of the same name without .safetensors beside it, with "
    "the configuration and tokenizer of its family (a diffusers folder without weights), or allow the hub"
)
SUPPORTED = f"the trainer loads {', '.join(FAMILIES)}"
_LEFT_OUT: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": {
        "safety_checker": None,
        "requires_safety_checker": False,
        "feature_extractor": None,
        "image_encoder": None,
    },
    "StableDiffusionXLPipeline": {
        "feature_extractor": None,
        "image_encoder": None,
        "add_watermarker": False,
    },
}
"""Parts of a pipeline that training does not need."""
_IMAGE_PROMPTS = {"feature_extractor": None, "image_encoder": None}


def load_pipeline(base: Base, hub_cache: Path | None = None) -> Any:
    """Return the model as a diffusers pipeline of a class of ``FAMILIES``, without safety checker, on the
    CPU, with the base's ``merged_adapters`` in it.

    Raises:
        BadInput, BaseUnavailable
    """
    pipeline = _loaded(base, hub_cache)
    if base.merged_adapters:
        from ..methods.from_file import merge  # methods import families

        roots = {name: root for name in NETWORKS if (root := getattr(pipeline, name, None)) is not None}
        for merged in base.merged_adapters:
            merge(merged, roots)
    return pipeline


def _loaded(base: Base, hub_cache: Path | None) -> Any:
    _quiet_libraries()
    path = Path(base.model).expanduser()
    if path.is_file():
        return _load_file(path, hub_cache)
    if path.is_dir():
        return _load_folder(str(path), base, {})
    if base.model.startswith((".", "/", "~")) or base.model.endswith(".safetensors"):
        raise BadInput(f"base model {base.model}: no such file or folder", WHERE)
    _probe_hub(base, hub_cache)
    where = {"revision": base.revision, "cache_dir": hub_cache}
    return _load_folder(base.model, base, where)


def _quiet_libraries() -> None:
    """Errors reach us as exceptions; progress bars and advice would only fill the run's log."""
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def _load_folder(name: str, base: Base, where: dict[str, Any]) -> Any:
    try:
        index = diffusers.DiffusionPipeline.load_config(name, **where)
        pipeline_class, left_out = pipeline_kind(base.model, index)
        return pipeline_class.from_pretrained(name, use_safetensors=True, **left_out, **where)
    except BadInput:
        raise
    except Exception as error:
        if broke_off(error):
            raise _unavailable(base.model, error) from error
        if not isinstance(error, (OSError, ValueError, KeyError, RuntimeError)):
            raise
        # What diffusers and transformers raise for a missing, damaged or pickled component.
        raise BadInput(f"base model {base.model} cannot be loaded: {error}", WHERE) from error


def pipeline_kind(model: str, index: Any) -> tuple[Any, dict[str, Any]]:
    """Return the class that a ``model_index.json`` names, and its parts to leave out.

    Raises:
        BadInput: No family is loaded by it.
    """
    name = str(index.get("_class_name"))
    if name not in FAMILIES:
        raise BadInput(f"base model {model} is a {name}; no model of this class can be trained", SUPPORTED)
    absent = {part: None for part, value in index.items() if value in ([None, None], (None, None))}
    return getattr(diffusers, name), {**absent, **_LEFT_OUT.get(name, _IMAGE_PROMPTS)}


def _load_file(path: Path, hub_cache: Path | None) -> Any:
    if path.suffix != ".safetensors":
        raise BadInput(f"base model {path}: only .safetensors files are read, never pickles", WHERE)
    config = path.with_suffix("")
    where: dict[str, Any] = {"config": str(config)} if config.is_dir() else {"cache_dir": hub_cache}
    try:
        shapes = _shapes(path)
        index = (
            diffusers.DiffusionPipeline.load_config(str(config))
            if config.is_dir()
            else {"_class_name": _kind_of_file(path, shapes)}
        )
        pipeline_class, left_out = pipeline_kind(str(path), index)
        for name in FAMILIES[pipeline_class.__name__]:
            left_out |= dict.fromkeys(family_class(name).absent(shapes))
        pipeline = pipeline_class.from_single_file(str(path), **left_out, **where)
        for part in pipeline.components.values():
            if hasattr(part, "tie_weights"):  # T5 has its embedding under two names, a file perhaps under one
                part.tie_weights()
        return pipeline
    except BadInput:
        raise
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise BadInput(f"base model {path}: HF_HUB_OFFLINE is set", OFFLINE_CONFIG) from error
        raise BaseUnavailable(
            f"base model {path}: the hub did not answer: {error}", OFFLINE_CONFIG
        ) from error
    except (
        *(OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError),
        *(SafetensorError, SingleFileComponentError),
    ) as error:
        hint = WHERE if config.is_dir() else OFFLINE_CONFIG
        if "meta tensor" in str(error):  # what torch says of a weight that nothing was loaded into
            raise BadInput(
                f"base model {path} lacks weights that its family has", "fetch it again"
            ) from error
        raise BadInput(f"base model {path} cannot be loaded: {error}", hint) from error


def _shapes(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file without their numbers: its header only is read."""
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        return {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names}


def _kind_of_file(path: Path, shapes: dict[str, torch.Tensor]) -> str:
    """Return the pipeline class by which diffusers would read a single file.

    Raises:
        BadInput: It holds no model that can be trained.
    """
    kind = infer_diffusers_model_type(shapes)
    if kind == "v1" and CHECKPOINT_KEY_NAMES["v1"] not in shapes:  # what it says when it knows nothing better
        raise BadInput(
            f"base model {path} holds none of the models that diffusers knows by their names: "
            f"{len(shapes)} tensors such as {min(shapes, default='none')}",
            "an adapter is no base model: it belongs into base.initial_adapter or base.merged_adapters",
        )
    if kind not in FILE_KINDS:
        raise BadInput(f"base model {path} is of the kind {kind}; no such model can be trained", SUPPORTED)
    return FILE_KINDS[kind]


def _probe_hub(base: Base, hub_cache: Path | None) -> None:
    """Ask for the smallest file first: its errors are precise, those of loading a pipeline are not."""
    name = f"base model {base.model}" + (f" at revision {base.revision}" if base.revision else "")
    try:
        hf_hub_download(base.model, "model_index.json", revision=base.revision, cache_dir=hub_cache)
    except GatedRepoError as error:
        raise BadInput(
            f"{name} is gated", "accept its licence on huggingface.co, then `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise BadInput(f"{name}: the hub has no such revision", "base.revision is a commit") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise BadInput(f"{name}: neither a local path nor a model on the hub", WHERE) from error
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise BadInput(
                f"{name} is neither a local path nor in the local hub cache, and HF_HUB_OFFLINE is set",
                "download it first with `hf download`, or give a local folder",
            ) from error
        raise _unavailable(base.model, error) from error
    except EntryNotFoundError as error:
        raise BadInput(f"{name} has no model_index.json: not a diffusers model", WHERE) from error
    except Exception as error:  # whatever the HTTP library of the day raises
        raise _unavailable(base.model, error) from error


def _unavailable(model: str, error: Exception) -> BaseUnavailable:
    return BaseUnavailable(
        f"base model {model} is not a local path, and the hub did not answer: "
        f"{type(error).__name__}: {error}",
        "give a local diffusers folder, or check this node's network",
    )
