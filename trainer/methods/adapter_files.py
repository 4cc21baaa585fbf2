"""Reads an adapter file of any of the usual forms, as tensors and configurations of our own checkpoints.

    ours       a checkpoint's ``adapter.safetensors``, configurations in the header
    diffusers  ``unet.….lora_A.weight``, alpha in the header ``lora_adapter_metadata``, else equal to the rank
    kohya      ``lora_unet_….lora_down.weight`` with an alpha per module; ``dora_scale`` for DoRA
    LyCORIS    kohya's modules with ``hada_*`` (LoHa) or ``lokr_*`` (LoKr)
    PEFT       see ``peft_files``

A file means something for one base model only: every module that it names must be there.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.tuners.lokr.layer import factorization
from pydantic import BaseModel, PositiveInt, ValidationError
from torch import Tensor, nn

from ..errors import BadInput
from .adapter_parts import OTHER_BASE, alpha_of, by_module, kind_of, rank_of
from .configs import Told, read_configs, told_by_module
from .layers import MAGNITUDE
from .module_names import known_names
from .peft_files import ADAPTER_METADATA, opened


class _Said(BaseModel):
    """What diffusers' header says of one network, as far as it matters here."""

    r: PositiveInt
    lora_alpha: float
    target_modules: list[str] | str = ""
    rank_pattern: dict[str, PositiveInt] = {}
    alpha_pattern: dict[str, float] = {}
    use_dora: bool = False
    use_rslora: bool = False


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """An adapter as a checkpoint of ours would hold it."""

    tensors: Mapping[str, Tensor]
    """fp32, by ``<network>.<module>.<part>``."""
    configs: Mapping[str, Told]
    """By network, see ``configs``."""


def read_adapter_file(path: Path, networks: Mapping[str, nn.Module]) -> AdapterFile:
    """Read a file, or a folder of PEFT's, that was made for this base model.

    Args:
        networks: The base's, by ``unet``, ``transformer``, ``text_encoder``, ``text_encoder_2``…

    Raises:
        BadInput: It is missing, no adapter, of a form that is not known, or of another base. Names the first
            thing that does not fit.
    """
    tensors, metadata = opened(path)
    modules = by_module(path, tensors, known_names(networks).get)
    told = told_in_header(path, metadata)
    found: dict[str, Tensor] = {}
    configs: dict[str, Told] = {}
    for network in sorted({network for network, _ in modules}):
        parts = {name: those for (of, name), those in modules.items() if of == network}
        if network in told:
            configs[network] = {"target_modules": sorted(parts), **told[network]}
        else:
            configs[network] = _told_by_tensors(path, parts, networks[network])
        for name, those in parts.items():
            found |= {f"{network}.{name}.{part}": t.float() for part, t in those.items() if part != "alpha"}
    return AdapterFile(found, configs)


def told_in_header(path: Path, metadata: Mapping[str, str]) -> dict[str, Told]:
    """Return the configurations that a header holds, in our form or in diffusers'."""
    if "config" in metadata:
        try:
            return dict(read_configs(metadata))
        except ValueError:
            return {}  # somebody else's word
    by_network: dict[str, dict[str, Any]] = defaultdict(dict)
    try:
        for key, value in json.loads(metadata.get(ADAPTER_METADATA, "{}")).items():
            network, _, name = key.partition(".")
            if value is not None:
                by_network[network][name] = value
        return {
            network: {"peft_type": "LORA", **_Said.model_validate(said).model_dump(exclude_unset=True)}
            for network, said in by_network.items()
        }
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise BadInput(f"adapter {path}: its {ADAPTER_METADATA}: {where}: {first['msg']}") from error
    except (ValueError, AttributeError) as error:
        raise BadInput(f"adapter {path}: its {ADAPTER_METADATA} is damaged") from error


def _told_by_tensors(path: Path, parts: Mapping[str, Mapping[str, Tensor]], root: nn.Module) -> Told:
    """Return the configuration that tensors say themselves: ranks by their shapes, alpha by its own."""
    kinds = {kind_of(path, name, those) for name, those in parts.items()}
    if len(kinds) > 1:
        raise BadInput(f"adapter {path} mixes {' and '.join(sorted(kinds))}", "use one file for each")
    (kind,) = kinds
    ranks = {name: rank_of(those) for name, those in parts.items()}
    alphas = {name: alpha_of(those, ranks[name]) for name, those in parts.items()}
    told = told_by_module(kind, ranks, alphas)
    match kind:
        case "LORA":
            return told | {"use_dora": any(MAGNITUDE in those for those in parts.values())}
        case "LOHA":
            return told | {"use_effective_conv2d": any("hada_t1" in those for those in parts.values())}
    split = any("lokr_w1_a" in those for those in parts.values())
    factor = _factor(path, parts, root)
    return told | {"decompose_both": split, "decompose_factor": factor}


def _factor(path: Path, parts: Mapping[str, Mapping[str, Tensor]], root: nn.Module) -> int:
    """Return the factor by which LoKr split the sizes of all modules."""
    shapes = {}
    for name, those in parts.items():
        layer: Any = root.get_submodule(name)
        out, into = getattr(layer, "base_layer", layer).weight.shape[:2]
        w1 = those.get("lokr_w1")
        first = tuple(w1.shape) if w1 is not None else (len(those["lokr_w1_a"]), those["lokr_w1_b"].shape[1])
        shapes[name] = (out, into, first)
    for factor in (-1, *sorted({size for *_, first in shapes.values() for size in first})):
        if all(
            (factorization(out, factor)[0], factorization(into, factor)[0]) == first
            for out, into, first in shapes.values()
        ):
            return factor
    raise BadInput(f"adapter {path}: its LoKr factors have sizes that no single factor gives", OTHER_BASE)
