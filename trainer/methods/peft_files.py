"""PEFT's own files of an adapter, read as one of ours: each is of one network, and does not say of which.

    PEFT       <folder>/adapter_model.safetensors   ``base_model.model.….lora_A.weight``, and beside it
               <folder>/adapter_config.json         rank, alpha, kind
    diffusers  ``save_lora_adapter`` of a network: bare names ``down_blocks.0.…``, PEFT's words in the header

Several networks are folders side by side that are called as the networks: ``unet``, ``text_encoder``.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from pydantic import BaseModel, PositiveInt, ValidationError
from torch import Tensor

from ..errors import BadInput
from . import adapter_parts
from .configs import CONFIG, KNOWN, Told
from .module_names import ROOTS

PREFIX = "base_model.model."
"""Before each name in a file of ``PeftModel.save_pretrained``."""
ADAPTER_METADATA = "lora_adapter_metadata"
"""Under which diffusers writes PEFT's words into a header."""
_ONLY_THE_ADAPTER = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways of PEFT to begin that leave the base as it is. The others change it, and say so nowhere else."""


class _Config(BaseModel):
    """What PEFT says of an adapter, as far as it matters here."""

    peft_type: Literal["LORA", "LOHA", "LOKR"]
    r: PositiveInt
    lora_alpha: float | None = None
    alpha: float | None = None
    rank_pattern: dict[str, PositiveInt] = {}
    alpha_pattern: dict[str, float] = {}
    use_dora: bool = False
    use_rslora: bool = False
    use_effective_conv2d: bool = False
    decompose_both: bool = False
    decompose_factor: int = -1
    init_lora_weights: bool | str | None = True
    base_model_name_or_path: str | None = None


def is_peft(path: Path) -> bool:
    """Whether this is a folder as PEFT writes it, or the file in one."""
    return path.is_dir() or (path.name == SAFETENSORS_WEIGHTS_NAME and (path.parent / CONFIG_NAME).is_file())


def networks_in(folder: Path) -> list[Path]:
    """Return the folders of PEFT's in a folder that are called as networks."""
    return [folder / network for network in ROOTS if (folder / network / CONFIG_NAME).is_file()]


def opened(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the header of an adapter of any form: a file, or a folder of PEFT's.

    PEFT's names begin with the network, as ours do, and its configurations are in the header, as in ours.

    Raises:
        BadInput: See ``adapter_parts.opened``; or PEFT's configuration is missing or damaged.
    """
    if not path.is_dir():
        return _of_one(path)
    folders = [path] if (path / CONFIG_NAME).is_file() else networks_in(path)
    if not folders:
        raise BadInput(
            f"adapter {path} is a folder, and none of PEFT's: there is no {CONFIG_NAME}",
            "give the .safetensors file in it",
        )
    tensors: dict[str, Tensor] = {}
    header: dict[str, str] = {}
    configs: dict[str, Told] = {}
    for folder in folders:
        own, said = _of_one(folder / SAFETENSORS_WEIGHTS_NAME)
        tensors |= own
        configs |= json.loads(said.get(CONFIG, "{}"))
        header |= said
    return tensors, {**header, CONFIG: json.dumps(configs, sort_keys=True)}


def _of_one(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors, header = adapter_parts.opened(path)
    config: _Config | None
    if any(key.startswith(PREFIX) for key in tensors):
        beside = path.parent / CONFIG_NAME
        try:
            config = _config(beside, beside.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            problem = f"{path} is PEFT's, and {CONFIG_NAME} beside it, which says alpha, cannot be read"
            raise BadInput(f"adapter {problem}", "keep both files in one folder") from error
    elif any(_network_of(key) for key in tensors):
        config = _config(path, header.pop(ADAPTER_METADATA)) if ADAPTER_METADATA in header else None
    else:
        return tensors, header
    bare = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    network = _network(path, config, bare)
    if config is not None:
        header = {**header, CONFIG: json.dumps({network: _told(path, config)})}
    return {f"{network}.{key}": tensor for key, tensor in bare.items()}, header


def _config(path: Path, text: str) -> _Config:
    try:
        return _Config.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise BadInput(f"adapter {path}: PEFT's configuration: {where}: {first['msg']}") from error


def _told(path: Path, config: _Config) -> Told:
    given: dict[str, Any] = config.model_dump(exclude_none=True, exclude_defaults=True)
    told = {key: value for key, value in given.items() if key in KNOWN[config.peft_type]}
    alpha = "lora_alpha" if config.peft_type == "LORA" else "alpha"
    if alpha not in told:
        raise BadInput(f"adapter {path}: PEFT's configuration says no {alpha}")
    if config.peft_type == "LORA" and config.init_lora_weights not in _ONLY_THE_ADAPTER:
        raise BadInput(
            f"adapter {path} was begun with {config.init_lora_weights}, which changes the base too",
            "let PEFT convert it: save_pretrained(…, path_initial_model_for_weight_conversion=…)",
        )
    return {"peft_type": config.peft_type, **told}


def _network(path: Path, config: _Config | None, bare: Iterable[str]) -> str:
    """Return the network by the folder's name, by that of what was adapted, or by the modules' names."""
    adapted = Path(config.base_model_name_or_path or "").name if config else ""
    found = next((network for key in bare if (network := _network_of(key))), None)
    if found is None:
        raise BadInput(f"adapter {path}: {next(iter(bare))} is of no known network", adapter_parts.FAMILIES)
    alike = [network for network in ROOTS if ROOTS[network] == ROOTS[found]]
    return next((name for name in (path.absolute().parent.name, adapted) if name in alike), found)


def _network_of(key: str) -> str | None:
    """Return the first network with modules of such a name."""
    root = key.removeprefix(PREFIX).partition(".")[0]
    return next((network for network, roots in ROOTS.items() if root in roots), None)


def config_text(config: Mapping[str, Any]) -> str:
    """Return the text of PEFT's ``adapter_config.json``, from what a configuration of PEFT's holds."""
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    return json.dumps({**plain, "inference_mode": True}, indent=2, sort_keys=True) + "\n"
