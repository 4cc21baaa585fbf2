"""What can be known of adapters before anything is launched: that their files are there, that ranks fit.

The sizes of a local model's layers are read from the headers of its files. What is in an adapter's file is
for the trainer to say, before its first step.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from trainer.config import Base, RunSpec
from trainer.config.families import CONVOLUTIONAL, DENOISERS
from trainer.config.layer_sizes import UNET_TARGETS, Shape, endings, misfit
from trainer.spec_inputs import inputs_of

from ..errors import Problem

_READS_TEXT = re.compile(r"attn2[._]to_k(\.|$)")
_OF_INPUTS = ("lora_A.weight", "lora_down.weight", "lora.down.weight", "hada_w1_b")
"""Factors with an axis of the layer's inputs."""
_LENGTH_BYTES, _MAX_HEADER_BYTES = 8, 10_000_000


def adapter_problems(specs: Iterable[RunSpec]) -> Iterator[Problem]:
    """Yield what is wrong with the adapters that runs begin with, merge or train."""
    specs = list(specs)
    files = {
        (named.path, named.key) for spec in specs for named in inputs_of(spec) if named.place.kind == "files"
    }
    for path, key in sorted(files):
        if not path.endswith(".safetensors"):
            hint = "convert it to .safetensors first"
            yield Problem("E2332", f"adapter {path} is no .safetensors file", key, hint)
        elif not Path(path).is_file():
            hint = "relative paths start at the folder of the sweep file"
            yield Problem("E2331", f"adapter {path} does not exist", key, hint)
    for spec in specs:
        yield from _of_another_base(spec)
    read = ("train", "model", "adapter", "rank", "conv_rank", "targets")
    for base in {tuple(getattr(spec.base, key) for key in read): spec.base for spec in specs}.values():
        yield from _fitting(base)


def _fitting(base: Base) -> Iterator[Problem]:
    """Yield why a model cannot be trained so, by the sizes and the kind of its layers."""
    folder = Path(base.model)
    if not folder.is_absolute() or not folder.is_dir():
        return
    try:
        kind = json.loads((folder / "model_index.json").read_bytes())["_class_name"]
        shapes = _layers(folder / DENOISERS.get(kind, "unet"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # said of the model itself
    if "hypernetwork" in base.train and kind not in CONVOLUTIONAL:
        message = f"a {kind} has no UNet, whose attention a hypernetwork changes"
        yield Problem("E2333", message, "base.train", "train an adapter")
    if "adapter" not in base.train:
        return
    if kind not in CONVOLUTIONAL and base.conv_rank:
        message = f"a {kind} has no convolutions to adapt"
        yield Problem("E2333", message, "base.conv_rank", "leave conv_rank out")
    elif shapes and kind in CONVOLUTIONAL and (found := misfit(base, shapes, endings(base, UNET_TARGETS))):
        key, message, hint = found
        yield Problem("E2333", f"{base.model}: {key} {message}", f"base.{key}", hint)


def _of_another_base(spec: RunSpec) -> Iterator[Problem]:
    """Yield the adapters that were trained on text states of another width than the base's."""
    try:
        width = json.loads((Path(spec.base.model) / "unet" / "config.json").read_bytes())[
            "cross_attention_dim"
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return
    for named in inputs_of(spec):
        if named.place.kind != "files" or not isinstance(width, int):
            continue
        try:
            shapes = _shapes(Path(named.path))
        except (OSError, ValueError, AttributeError):
            continue  # the trainer says what is wrong with it
        read = {
            shape[1]
            for name, shape in shapes.items()
            if _READS_TEXT.search(name) and name.endswith(_OF_INPUTS) and len(shape) > 1
        }
        if read and width not in read:
            message = (
                f"adapter {named.path} was trained on a base with text states of {min(read)} numbers, "
                f"{spec.base.model} has {width}"
            )
            hint = "an adapter fits only the kind of base model that it was trained on"
            yield Problem("E2334", message, named.key, hint)


def _layers(folder: Path) -> dict[str, Shape]:
    """Return the shapes of the weights that a network's files hold, by module."""
    return {
        name.removesuffix(".weight"): shape
        for path in sorted(folder.glob("*.safetensors"))
        for name, shape in _shapes(path).items()
        if name.endswith(".weight") and len(shape) > 1
    }


def _shapes(path: Path) -> dict[str, Shape]:
    """Return the shapes of a file's tensors, from its header."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        header = json.loads(file.read(length)) if length <= _MAX_HEADER_BYTES else {}
    return {name: tuple(tensor["shape"]) for name, tensor in header.items() if "shape" in tensor}
