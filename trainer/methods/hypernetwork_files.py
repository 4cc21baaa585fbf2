"""Files of hypernetworks: A1111's ``.pt``, which ComfyUI reads too, and ``.safetensors`` of our own.

A1111's is a dictionary: by width (an int) the states of the two networks for keys and values, and beside
them how they are built. It is a pickle, read with ``weights_only``: tensors, numbers, texts, nothing that
runs.

Ours has a checkpoint's names (``hypernetwork.768_k.linear.0.weight``) and in its header, under
``hypernetwork``, how they are built.
"""

import io
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from storage.errors import InvalidName

from ..errors import BadInput
from ..families import Family
from ..tensor_file import read
from .hypernetwork import ACTIVATIONS, PREFIX, SETTINGS, Hypernetwork, Settings, put_before_attention

A1111_SUFFIX = ".pt"
_OLD_NAMES = {"linear1": "linear.0", "linear2": "linear.1"}
"""Of A1111's first files."""

Layers = list[tuple[Tensor, Tensor]]
"""Weight and bias of one network's layers in their order; a weight with one axis is that of a norm."""


@dataclass(frozen=True, slots=True)
class HypernetworkFile:
    """What a file holds."""

    settings: Settings
    layers: Mapping[str, Layers]
    """By ``<width>_k`` and ``<width>_v``."""
    base: str | None = None
    """What it says of the base model that it was trained on."""


def a1111_bytes(made: Hypernetwork, dtype: torch.dtype, *, name: str, step: int, base: str) -> bytes:
    """Return a hypernetwork as A1111 saves it. Equal ones are equal files."""
    settings = made.settings
    dropout = [0.0, *[settings["dropout"]] * (len(settings["layers"]) - 2), 0.0]
    said: dict[Any, Any] = {
        "step": step,
        "name": name,
        "layer_structure": list(settings["layers"]),
        "activation_func": settings["activation"],
        "is_layer_norm": settings["layer_norm"],
        "weight_initialization": "Normal",
        "sd_checkpoint": None,
        "sd_checkpoint_name": base,
        "activate_output": False,
        "use_dropout": settings["dropout"] > 0,
        "dropout_structure": dropout,
        "last_layer_dropout": dropout[-2] != 0,
    }
    for width in sorted({int(key.partition("_")[0]) for key in made.networks}):
        said[width] = tuple(_state(made.networks[f"{width}_{part}"], dtype) for part in "kv")
    buffer = io.BytesIO()
    torch.save(said, buffer)
    return buffer.getvalue()


def read_hypernetwork(path: Path) -> HypernetworkFile:
    """Return what a file holds; numbers are fp32.

    Raises:
        BadInput: It is no hypernetwork, is damaged, or holds what cannot be computed here.
    """
    try:
        found = _of_a1111(path) if path.suffix == A1111_SUFFIX else _of_ours(path)
    except (OSError, InvalidName, SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput(f"{path}: {why}", "give the file of a hypernetwork") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise BadInput(f"{path} holds no hypernetwork as A1111 or this program writes it: {error}") from error
    for key, layers in found.layers.items():
        for place, pair in enumerate(layers):
            if not all(torch.isfinite(tensor).all() for tensor in pair):
                raise BadInput(f"{path}: layer {place} of {key} holds NaN or infinity")
    return found


def put_onto(found: HypernetworkFile, family: Family, name: str, path: Path) -> Hypernetwork:
    """Put a file's hypernetwork before the attention of a family's denoiser, active.

    Raises:
        BadInput: It is of another base model.
    """
    made = put_before_attention(family, name, found.settings, str(path))
    if odd := sorted(made.networks.keys() - found.layers.keys()):
        raise BadInput(f"{path} has nothing for {odd[0]}", "it is of another base model")
    for key, network in made.networks.items():
        own: list[Any] = [m for m in network.modules() if isinstance(m, nn.Linear | nn.LayerNorm)]
        given = found.layers[key]
        shapes = [tuple(layer.weight.shape) for layer in own]
        if shapes != [tuple(weight.shape) for weight, _ in given]:
            raise BadInput(f"{path}: the layers of {key} are not those of {found.settings['layers']}")
        for layer, (weight, bias) in zip(own, given, strict=True):
            layer.weight.data.copy_(weight)
            layer.bias.data.copy_(bias)
    return made


def layers_of(made: Hypernetwork) -> dict[str, Layers]:
    """Return a hypernetwork's numbers, on the CPU."""
    return {key: _layers(_state(network, torch.float32)) for key, network in made.networks.items()}


def _state(network: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", dtype) for name, tensor in network.state_dict().items()}


def _layers(state: Mapping[str, Tensor]) -> Layers:
    """Activations and dropout have numbers too, but no tensors: only the order counts."""
    named = {_OLD_NAMES.get(n.rpartition(".")[0], n.rpartition(".")[0]) for n in state}
    renamed = {
        f"{_OLD_NAMES.get(n.rpartition('.')[0], n.rpartition('.')[0])}.{n.rpartition('.')[2]}": tensor.float()
        for n, tensor in state.items()
    }
    order = sorted(named, key=lambda layer: int(layer.rpartition(".")[2]))
    return [(renamed[f"{layer}.weight"], renamed[f"{layer}.bias"]) for layer in order]


def _of_a1111(path: Path) -> HypernetworkFile:
    said = torch.load(path, map_location="cpu", weights_only=True)
    layers = {
        f"{width}_{part}": _layers(states["kv".index(part)])
        for width, states in said.items()
        if isinstance(width, int)
        for part in "kv"
    }
    activation = said.get("activation_func") or "linear"
    if activation not in ACTIVATIONS:
        raise BadInput(f"{path}: its activation {activation} is not known here")
    if said.get("activate_output") and activation != "linear":
        raise BadInput(f"{path}: its last layer has an activation, which is not computed here")
    if not layers:
        raise ValueError("there is no network in it")
    widths = {int(key.partition("_")[0]) for key in layers}
    norms = any(weight.ndim == 1 for pairs in layers.values() for weight, _ in pairs)
    structure = said.get("layer_structure") or [1, 2, 1]
    return HypernetworkFile(
        Settings(
            layers=[float(multiple) for multiple in structure],
            activation=activation,
            layer_norm=norms,
            dropout=0.0,
            self_attention=len(widths) > 1,
        ),
        layers,
        said.get("sd_checkpoint_name"),
    )


def _of_ours(path: Path) -> HypernetworkFile:
    tensors, header = read(path)
    told = json.loads(header[SETTINGS])
    by_network: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(PREFIX):
            key, _, rest = name.removeprefix(PREFIX).partition(".")
            by_network.setdefault(key, {})[rest] = tensor
    if not by_network:
        raise ValueError("there is no network in it")
    settings = Settings(
        layers=[float(multiple) for multiple in told["layers"]],
        activation=str(told["activation"]),
        layer_norm=bool(told["layer_norm"]),
        dropout=0.0,  # of training only
        self_attention=bool(told["self_attention"]),
    )
    if settings["activation"] not in ACTIVATIONS:
        raise BadInput(f"{path}: its activation {settings['activation']} is not known here")
    return HypernetworkFile(settings, {key: _layers(state) for key, state in by_network.items()})
