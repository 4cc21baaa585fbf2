"""Puts a file onto a base model, as a user would: through diffusers where it reads the form.

diffusers reads LoRA in its own form and in kohya's. It does not read LoHa and LoKr, and drops DoRA's
magnitudes from kohya's form: those go through our own reader, ``methods.adapter_files``, as do checkpoints.
Hypernetworks are read by ``methods.hypernetwork_files``, taught words by ``tokens``.
"""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from ..config import Base
from ..errors import BadInput, TrainerError
from ..families import Family, family_of, load_family
from ..families.source import load_pipeline
from ..methods.adapter_files import read_adapter_file
from ..methods.from_file import put_onto
from ..methods.hypernetwork import SETTINGS, Residual
from ..methods.hypernetwork_files import A1111_SUFFIX, read_hypernetwork
from ..methods.hypernetwork_files import put_onto as put_hypernetwork
from .modules import adapted_modules, networks

NAME = "exported"
"""Of the adapter on the networks."""
_FOREIGN = ("hada_", "lokr_", "dora_scale")
"""What diffusers does not read."""


class NotReadable(TrainerError):
    """A file that does not become an adapter of this base."""


def read_onto_base(path: Path, base: Base) -> tuple[Family, str]:
    """Load a base anew and put a file's adapter or hypernetwork onto it, active; return both, by its name.

    Raises:
        NotReadable: It is neither, or of another base.
        BadInput, BaseUnavailable: The base cannot be loaded.
    """
    if path.suffix == A1111_SUFFIX:
        return _with_hypernetwork(path, base), NAME
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            header = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise NotReadable(f"{path}: {error}") from error
    if SETTINGS in header:
        return _with_hypernetwork(path, base), NAME
    own = "config" in header or any(part in name for name in names for part in _FOREIGN)
    return (_by_ourselves if own else _by_diffusers)(path, base), NAME


def scale(family: Family, weight: float) -> None:
    """Multiply all that an adapter or a hypernetwork changes by a weight, as ``<lora:name:0.8>`` does in web
    interfaces. Of a finetuned model nothing is left out."""
    for network in networks(family).values():
        for layer in network.modules():
            scaling: Any = getattr(layer, "scaling", None)
            if isinstance(scaling, dict) and NAME in scaling:
                scaling[NAME] *= weight
            if isinstance(layer, Residual):
                layer.multiplier = weight


def _by_diffusers(path: Path, base: Base) -> Family:
    pipeline = load_pipeline(base)
    try:
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=NAME)
    except (ValueError, KeyError, RuntimeError, TypeError) as error:
        raise NotReadable(f"{path}: diffusers does not load it: {error}", "is it of another base?") from error
    for part in pipeline.components.values():
        for name, parameter in part.named_parameters() if isinstance(part, nn.Module) else ():
            if parameter.is_meta:
                raise NotReadable(f"{path}: {name} finds no tensor of its own in the file", "is it whole?")
    family = family_of(pipeline, base)
    if not adapted_modules(networks(family), NAME):
        raise NotReadable(f"{path}: diffusers finds nothing for this base in it", "is it of another base?")
    return family


def _by_ourselves(path: Path, base: Base) -> Family:
    family = load_family(base)
    try:
        put_onto(read_adapter_file(path, networks(family)), networks(family), NAME, path)
    except BadInput as error:
        raise NotReadable(str(error), error.hint) from error
    return family


def _with_hypernetwork(path: Path, base: Base) -> Family:
    try:
        found = read_hypernetwork(path)
        family = load_family(base)
        put_hypernetwork(found, family, NAME, path)
    except BadInput as error:
        raise NotReadable(str(error), error.hint) from error
    return family
