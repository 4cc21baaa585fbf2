"""A base model as it would be loaded, but for its weights: networks on torch's meta device, from their
configurations. Nothing of its size is read, fetched or held in memory."""

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub import snapshot_download
from torch import nn

from ..config import Base
from ..config.families import FAMILIES
from ..errors import BadInput
from . import Family, family_class
from .source import WHERE, pipeline_kind

_SMALL = ("*.json", "*.txt", "*.model")
"""What of a hub repository says how a model is built."""


def unloaded_family(base: Base, hub_cache: Path | None = None) -> Family:
    """Return a family whose networks are on the meta device, with the ControlNet of ``base.control``.

    Raises:
        BadInput: The model's configuration is not there, or of no family that can be trained. Or so of the
            ControlNet's.
    """
    folder = _described(base, hub_cache)
    try:
        index = diffusers.DiffusionPipeline.load_config(str(folder))
        kind, left_out = pipeline_kind(base.model, index)
        parts = {
            name: _part(folder, name, *value)
            for name, value in index.items()
            if isinstance(value, list | tuple) and name not in left_out
        }
        settings = {key: index[key] for key in ("force_zeros_for_empty_prompt",) if key in index}
        pipeline = kind(**parts, **left_out, **settings)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise BadInput(f"base model {base.model} is not described in full: {error}", WHERE) from error
    found = (family_class(name) for name in FAMILIES[kind.__name__])
    family: Family = next(one for one in found if one.fits(pipeline))(pipeline, base, torch.device("meta"))
    if base.control:
        family.inject(base.control, hub_cache)
    return family


def _described(base: Base, hub_cache: Path | None) -> Path:
    path = Path(base.model).expanduser()
    if path.is_file():
        path = path.with_suffix("")  # the folder beside a single file
    if path.is_dir():
        return path
    if path.is_absolute() or base.model.startswith((".", "~")):
        raise BadInput(f"base model {base.model}: no such folder, and no folder beside such a file", WHERE)
    try:
        return Path(
            snapshot_download(
                base.model, revision=base.revision, cache_dir=hub_cache, allow_patterns=list(_SMALL)
            )
        )
    except Exception as error:  # whatever the HTTP library of the day raises
        raise BadInput(
            f"base model {base.model}: its configuration cannot be fetched: {error}", WHERE
        ) from error


def _part(folder: Path, name: str, library: str, kind: str) -> Any:
    """Return one part of a pipeline: what has weights without them, and the rest as it is."""
    found = getattr({"diffusers": diffusers, "transformers": transformers}[library], kind)
    if not issubclass(found, nn.Module):
        return found.from_pretrained(folder / name)
    with torch.device("meta"):
        if library == "transformers":
            return found(found.config_class.from_pretrained(folder / name))
        return found.from_config(found.load_config(folder / name))
