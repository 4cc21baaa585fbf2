"""An adapter file put onto networks: to compute with, to go on training from, or merged for good."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..config import MergedAdapter
from ..errors import BadInput
from ..families import Family
from . import Methods
from .adapter_files import AdapterFile, read_adapter_file
from .configs import Told, read_configs, scale_of
from .initial import ZERO
from .layers import adapted, inject
from .targets import networks

_MERGED = "merged"
_TEXTS = ("text_encoder", "lora_te")


def put_onto(adapter: AdapterFile, roots: Mapping[str, nn.Module], name: str, path: Path) -> None:
    """Put a file's adapter beside the weights of networks, in fp32 and active.

    Raises:
        BadInput: A tensor of the file is missing, left over, or of another shape than this base's.
    """
    for network, told in adapter.configs.items():
        try:
            parameters = inject(roots[network], name, told)
        except ValueError as error:
            raise BadInput(f"adapter {path}: {error}", "is it of this base model?") from error
        prefix = f"{network}."
        tensors = {k.removeprefix(prefix): t for k, t in adapter.tensors.items() if k.startswith(prefix)}
        if problem := fill(parameters, tensors):
            raise BadInput(f"adapter {path}: {prefix}{problem}", "it is of another base model")


def fill(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> str | None:
    """Copy tensors into the parameters of the same names. Say what does not fit, or return None.

    Axes of length 1 do not count: some programs keep them of convolutions with kernels of 1, some do not.
    """
    for name in sorted(tensors.keys() ^ parameters.keys()):
        return f"{name} is {'left over' if name in tensors else 'missing'}"
    for name, parameter in parameters.items():
        if tensors[name].squeeze().shape != parameter.squeeze().shape:
            return f"{name} has shape {list(tensors[name].shape)}, expected {list(parameter.shape)}"
        parameter.data.copy_(tensors[name].reshape(parameter.shape))
    return None


def merge(merged: MergedAdapter, roots: Mapping[str, nn.Module]) -> None:
    """Add ``weight`` times what a file's adapter changes to the weights of networks, in fp32, for good.

    Raises:
        BadInput: The file does not fit these networks.
    """
    path = Path(merged.path).expanduser()
    adapter = read_adapter_file(path, roots)
    put_onto(adapter, roots, _MERGED, path)
    for network in adapter.configs:
        for name, layer in adapted(roots[network]):
            _merge_layer(layer, merged.weight)
            parent, _, own = name.rpartition(".")
            setattr(roots[network].get_submodule(parent), own, layer.get_base_layer())
        del roots[network].peft_config


@torch.no_grad()
def _merge_layer(layer: nn.Module, weight: float) -> None:
    """The change is that of PEFT's own merging, in fp32; a bias has none."""
    base = layer.get_base_layer()  # type: ignore[operator]
    kept = base.weight.data
    base.weight.data = kept.float().clone()
    layer.merge(adapter_names=[_MERGED])  # type: ignore[operator]
    changed = base.weight.data
    base.weight.data = (kept.float() + weight * (changed - kept.float())).to(kept.dtype)


def begin_with(path: Path, methods: Methods, family: Family) -> None:
    """Let a run begin with a file's adapter in place of one that changes nothing.

    Raises:
        BadInput: It is of another kind or rank, or adapts other modules. Names the first misfit.
    """
    hint = (
        "set adapter, rank, conv_rank, targets and train_text_encoder as the file has them, or merge it: "
        "merged_adapters"
    )
    if not family.text_encoders and _is_of_texts(path):  # they were freed: the file would seem another base's
        problem = "it adapts text encoders too, which this run does not train"
        raise BadInput(f"base.initial_adapter {path}: {problem}", hint)
    given = read_adapter_file(path, networks(family))
    configs = read_configs(methods.metadata())
    parameters = {
        name: parameter
        for name, parameter in methods.parameters.items()
        if name.startswith(tuple(f"{network}." for network in configs))  # the rest is no adapter's
    }
    trained = AdapterFile({name: parameter.data for name, parameter in parameters.items()}, configs)
    if found := misfit(given, trained):
        raise BadInput(f"base.initial_adapter {path}: {found}", hint)
    fill(parameters, rescaled(given, configs))


def _is_of_texts(path: Path) -> bool:
    """Whether a file names modules of text encoders; False too for one that cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return any(name.startswith(_TEXTS) for name in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError):
        return False


def misfit(given: AdapterFile, trained: AdapterFile) -> str | None:
    """Say why a run cannot go on from a file's adapter, or return None."""
    if odd := sorted(given.configs.keys() ^ trained.configs.keys()):
        which = "the file has" if odd[0] in given.configs else "the run trains"
        return f"only {which} one of the {odd[0]}"
    for network, told in trained.configs.items():
        theirs = given.configs[network]
        for key, ours in (("peft_type", ""), ("use_dora", False), ("use_rslora", False)):
            if (mine := told.get(key) or ours) != (found := theirs.get(key) or ours):
                return f"{network}: {key} is {found}, the run's is {mine}"
    for name in sorted(given.tensors.keys() ^ trained.tensors.keys()):
        return f"{name} is only in {'the file' if name in given.tensors else 'the run'}: targets differ"
    for name, tensor in trained.tensors.items():
        if given.tensors[name].squeeze().shape != tensor.squeeze().shape:
            shape = list(given.tensors[name].shape)
            return f"{name} has shape {shape}, the run's has {list(tensor.shape)}: rank or base model differ"
    return None


def rescaled(given: AdapterFile, configs: Mapping[str, Told]) -> dict[str, Tensor]:
    """Return a file's tensors for a run with another alpha: one factor of each product makes up for it."""
    found = {}
    for name, tensor in given.tensors.items():
        module, _, part = name.removesuffix(".weight").rpartition(".")
        network, _, inner = module.partition(".")
        ratio = scale_of(given.configs[network], inner) / scale_of(configs[network], inner)
        found[name] = tensor * ratio if part in ZERO and ratio != 1 else tensor
    return found
