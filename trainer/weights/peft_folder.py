"""Writes an adapter as PEFT does: a folder for each network, that ``PeftModel.from_pretrained`` reads.

The modules are called as in the models of the transformers that is installed, as PEFT itself calls them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..errors import BadInput
from ..export.files import Dtype, in_dtype
from ..export.modules import AdaptedModule
from ..export.pipeline_folder import appearing
from ..methods.configs import Told, peft_config
from ..methods.peft_files import PREFIX, config_text, networks_in
from ..tensor_file import to_bytes
from .lora_file import with_level


def check_replaceable(folder: Path) -> None:
    """
    Raises:
        BadInput: Something is there that was not written here: it is not replaced.
    """
    if not folder.exists():
        return
    if not folder.is_dir() or set(folder.iterdir()) != set(networks_in(folder)):
        raise BadInput(
            f"{folder} holds more than an adapter of PEFT's: it is not replaced", "give another --out"
        )


def write_folder(
    out: Path,
    modules: Sequence[AdaptedModule],
    configs: Mapping[str, Told],
    family: str,
    *,
    header: Mapping[str, str],
    dtype: Dtype,
) -> Path:
    """Write PEFT's two files of each network into ``<out>/<network>`` and return ``out``.

    Raises:
        BadInput: It cannot be written, or a number does not fit the type.
    """
    with appearing(out) as folder:
        for network, told in configs.items():
            tensors = {
                f"{PREFIX}{name_in_model(module, family)}.{part}": tensor
                for module in modules
                for part, tensor in module.tensors.items()
                if module.network == network
            }
            own = folder / network
            own.mkdir()
            body = to_bytes(in_dtype(tensors, dtype), {**header, "format": "pt"})
            (own / SAFETENSORS_WEIGHTS_NAME).write_bytes(body)
            (own / CONFIG_NAME).write_text(config_text(peft_config(told).to_dict()), encoding="utf-8")
    return out


def name_in_model(module: AdaptedModule, family: str) -> str:
    """Return what a module is called in its network."""
    return with_level(module.network, module.name) if family == "sd3" else module.name
