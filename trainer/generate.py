"""Images from an adapter's file: any form that we or diffusers can read, on the base that the file names.

The base is, in this order: what the person says; what our own header says; what the model card beside the
file says (``base_model`` in ``README.md``). Of a base that was a local folder, a header tells only the name.
How the base was used in training (``clip_skip``, what it predicts, its last noise level) is the header's, or
the run's, whoever says where the base is.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from .config import Base, Dataset, RunSpec, Samples
from .errors import BadInput
from .export.files import DIFFUSERS_NAME
from .export.headers import BASE_DIGEST, BASE_MODEL, BASE_REVISION, MERGED, SPEC
from .export.reading import NAME, read_onto_base, scale
from .export.tokens import is_of_word, put_files
from .export.whole import as_base, is_whole
from .families import Family, load_family
from .methods.full import METHOD as FULL
from .methods.hypernetwork_files import A1111_SUFFIX, read_hypernetwork
from .rundir import ADAPTER
from .sample import draw_images, trained_on_base, write_images
from .stop import Stop
from .tensor_file import read
from .texts import LiveTexts

CARD = "README.md"
_CLIP_SKIPS = tuple(map(str, range(1, 13)))
_PREDICTION = {"epsilon": "epsilon", "v": "v_prediction"}
_AS_FAST_AS_IT_GOES = {
    "mixed_precision": "fp16" if torch.cuda.is_available() else "no",
    "gradient_checkpointing": False,
    "compile": False,
    "quantize": "none",
}
"""Of a base, whatever it was trained in: an image differs by no more than rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is to be drawn."""

    prompts: tuple[str, ...]
    negative: str = ""
    seeds: tuple[int, ...] = (1,)
    steps: int = 25
    cfg: float = 7.0
    scale: float = 0.8
    """Multiplies what the adapter changes, as the number in ``<lora:name:0.8>`` does."""
    resolution: int | None = None
    """Side of the square image; by default that of the training images, else 512, SDXL and SD3 1024."""
    model: str | None = None
    """Where the base model is, if not where the file or its run says."""
    trigger: str | None = None
    """What ``[trigger]`` in a prompt stands for; by default what the file says."""


def generate(path: Path, base: Base | None, wish: Wish, out: Path) -> list[Path]:
    """Draw images into a new or empty folder and return their files.

    Args:
        path: A ``.safetensors`` file, a hypernetwork's ``.pt``, or the folder of an export or a checkpoint.
        base: Of the run; by default what the file or its card says.

    Raises:
        BadInput: Says what is missing.
        NotReadable: The file does not become an adapter of this base.
    """
    file = None if is_whole(path) else adapter_file(path)
    header = _header(file) if file else {}
    if file is None:
        base = as_base(path)
    elif base:
        base = _elsewhere(base, wish.model)
    else:
        base = base_of(file, header, wish.model)
    base = base.model_copy(update=_AS_FAST_AS_IT_GOES)
    trigger = wish.trigger or header.get("modelspec.trigger_phrase")
    if trigger is None and any("[trigger]" in prompt for prompt in wish.prompts):
        raise BadInput(f"{path} does not say what [trigger] stands for", "write the word itself")
    if out.exists() and any(out.iterdir()):
        raise BadInput(f"{out} is not empty", "give a new folder with --out")
    family = _family(file, header, base)
    put_files(words_in(path), family, NAME)
    scale(family, wish.scale)
    side = wish.resolution or _trained_side(header) or (1024 if family.name in ("sdxl", "sd3") else 512)
    spec = RunSpec(
        base=base.model_copy(update={"resolution": side}),
        dataset=Dataset(path="", trigger=trigger),
        samples=Samples(
            prompts=wish.prompts, negative=wish.negative, seeds=wish.seeds, steps=wish.steps, cfg=wish.cfg
        ),
    )
    out.mkdir(parents=True, exist_ok=True)
    write_images(out, draw_images(family, spec, LiveTexts(family), Stop()))
    return sorted(out.glob("*.png"))


def _family(file: Path | None, header: Mapping[str, str], base: Base) -> Family:
    """Load the base with what is in a file on it, by which one knows it as ``NAME``.

    Raises:
        BadInput: It is a checkpoint of which only the run knows what is in it.
    """
    if file is None:
        return load_family(base)
    if file.name == ADAPTER and base.train != Base(model="").train:
        return trained_on_base(base, file.parent, NAME)[0]
    if is_of_word(file):
        return load_family(base)
    if header.get("method") == FULL:
        raise BadInput(f"{file} holds the weights of a whole model", "draw from its run, or export it first")
    return read_onto_base(file, base)[0]


def words_in(path: Path) -> list[Path]:
    """Return the files of taught words that a path means: itself, or those beside whatever else is there."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return [file for file in files if is_of_word(file)]


def adapter_file(path: Path) -> Path:
    """Return the file of weights that a path means.

    Raises:
        BadInput: There is none, or several.
    """
    if path.is_file():
        return path
    for name in (ADAPTER, DIFFUSERS_NAME):
        if (path / name).is_file():
            return path / name
    words = words_in(path)
    found = [file for file in sorted(path.glob("*.safetensors")) if file not in words]
    found = found or words[:1] or sorted(path.glob(f"*{A1111_SUFFIX}"))
    if len(found) != 1:
        listed = ", ".join(file.name for file in found) or "none"
        raise BadInput(f"{path}: one .safetensors file is expected there, found {listed}", "name the file")
    return found[0]


def base_of(file: Path, header: Mapping[str, str], model: str | None = None) -> Base:
    """Return the base that a file was trained on, by its header or by the card beside it.

    Args:
        model: Where it is, if not where they say.

    Raises:
        BadInput: Neither says it, or it was a model on another machine.
    """
    if SPEC in header:
        return _elsewhere(RunSpec.model_validate_json(header[SPEC]).base, model)
    if model:
        return Base(model=model, **_settings(header))
    name = header.get(BASE_MODEL) or _of_card(file.parent / CARD)
    if name is None:
        version = header.get("ss_sd_model_name") or header.get("ss_base_model_version")
        known = f"; it says only {version}" if version else ""
        raise BadInput(
            f"{file}: neither its header nor a {CARD} beside it says which base model it is for{known}",
            "give --base, a hub id or a local model",
        )
    if merged := header.get(MERGED):
        raise BadInput(
            f"{file} belongs onto {name} with {merged} merged into it",
            "say with --base where such a model is, or draw from the run itself",
        )
    if "/" not in name and not Path(name).exists():
        digest = header.get(BASE_DIGEST)
        raise BadInput(
            f"{file} was trained on a local model called {name}"
            + (f" (sha256 {digest[:12]}…)" if digest else ""),
            "say with --base where that model is",
        )
    return Base(model=name, revision=header.get(BASE_REVISION), **_settings(header))


def _elsewhere(base: Base, model: str | None) -> Base:
    """The base with another place, at which it is as it was trained on, with whatever was merged into it."""
    moved = {"model": model, "revision": None, "digest": None, "merged_adapters": ()}
    return base.model_copy(update=moved) if model else base


def _settings(header: Mapping[str, str]) -> dict[str, Any]:
    """How the base was used in training, as far as a header tells."""
    found: dict[str, Any] = {}
    skip = header.get("ss_clip_skip", "")
    # kohya's scripts write down what was asked for, also where it means nothing: SDXL
    if skip in _CLIP_SKIPS and header.get("ss_base_model_version", "").startswith("sd_v"):
        found["clip_skip"] = int(skip)
    if BASE_MODEL in header:  # of other programs' files nobody knows what they mean by it
        if told := _PREDICTION.get(header.get("modelspec.prediction_type", "")):
            found["prediction_type"] = told
        found["zero_terminal_snr"] = header.get("ss_zero_terminal_snr") == "True"
    return found


def _header(file: Path) -> dict[str, str]:
    if file.suffix == A1111_SUFFIX:
        name = read_hypernetwork(file).base
        return {"ss_sd_model_name": name} if name else {}
    try:
        return read(file)[1]
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{file}: {error}", "give the .safetensors file of an adapter") from error


def _of_card(card: Path) -> str | None:
    """Return ``base_model`` of a card's header. Plain text in one line, as the hub writes it."""
    try:
        header = card.read_text(encoding="utf-8").partition("---")[2].partition("---")[0]
    except (OSError, UnicodeDecodeError):
        return None
    found = re.search(r"""^base_model:\s*["']?([^"'\s]+)["']?\s*$""", header, re.MULTILINE)
    return found[1] if found else None


def _trained_side(header: Mapping[str, str]) -> int | None:
    found = re.fullmatch(r"(\d+)x\1", header.get("modelspec.resolution", ""))
    return int(found[1]) if found else None
