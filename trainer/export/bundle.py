"""An adapter as the programs that people use want it: weights, and beside them what these programs show.

    diffusers   pytorch_lora_weights.safetensors
    kohya       NAME.safetensors
    a1111       NAME.safetensors, NAME.png, NAME.json                  A1111 and Forge: models/Lora
    comfyui     NAME.safetensors, NAME.png, NAME.metadata.json         ComfyUI: models/loras; LoRA-Manager
    hf          weights, README.md (the model card), images/           a repository on the hub
    dir         all of them

Weights are diffusers' where diffusers reads the adapter and the hub or diffusers is meant, else kohya's. For
SD3, whose names in kohya's files are those of another implementation, they are diffusers' throughout, the
scale folded into the tensors for ComfyUI, which does not read diffusers' header.

The preview and the card's images are samples of the run, if it drew any: every image with the text by which
A1111 knows how it was made.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..sample import INDEX
from .card import card
from .files import Dtype, Form, put, unreadable, write_weights
from .headers import Amount, described, public_name
from .trained import Trained

Target = Literal["diffusers", "kohya", "comfyui", "a1111", "hf", "dir"]
TARGETS: tuple[Target, ...] = ("diffusers", "kohya", "comfyui", "a1111", "hf", "dir")

WEIGHT = 0.8
"""With which an adapter is proposed to be used in web interfaces."""
_SAMPLER = {"sd3": "Euler"}
"""What A1111 calls what samples are drawn with, where it is not DPM-Solver multistep."""
_A1111_VERSION = {"sd1": "SD1", "sd2": "SD2", "sdxl": "SDXL", "sd3": "SD3"}
_MANAGER_BASE = {"sd1": "SD 1.5", "sd2": "SD 2.1", "sdxl": "SDXL 1.0", "sd3": "SD 3"}


@dataclass(frozen=True, slots=True)
class Sample:
    """A sample image of the run."""

    path: Path
    prompt: str
    seed: int


@dataclass(frozen=True, slots=True)
class Bundle:
    """What was written."""

    weights: tuple[Path, ...]
    """To be verified, each by itself."""
    beside: tuple[Path, ...]


def write_bundle(
    trained: Trained,
    folder: Path,
    to: Target,
    *,
    name: str | None = None,
    dtype: Dtype = "fp32",
    metadata: Amount = "minimal",
    samples: Sequence[Sample] = (),
) -> Bundle:
    """Write an adapter into a folder for those who read it there.

    Raises:
        BadInput: As ``write_weights``.
    """
    name = name or folder.name
    weights = []
    for form in _forms(trained, to):
        fold = form == "diffusers" and to in ("comfyui", "a1111")
        weights.append(
            write_weights(trained, folder, form, dtype=dtype, name=name, metadata=metadata, fold=fold)
        )
    return Bundle(tuple(weights), write_around(trained, folder, to, name, weights, samples))


def write_around(
    trained: Trained,
    folder: Path,
    to: Target,
    name: str,
    weights: Sequence[Path],
    samples: Sequence[Sample],
) -> tuple[Path, ...]:
    """Write what those who read the weights show beside them, and return the files."""
    beside: list[Path] = []
    if samples and to in ("comfyui", "a1111", "dir"):
        beside.append(_write_image(samples[0], folder / f"{name}.png", trained, name))
    if to in ("a1111", "dir"):
        beside.append(put(folder, f"{name}.json", _as_json(_a1111(trained))))
    if to in ("comfyui", "dir") and trained.modules:
        beside.append(
            put(folder, f"{name}.metadata.json", _as_json(_manager(trained, name, weights[0], samples)))
        )
    if to in ("hf", "dir"):
        (folder / "images").mkdir(exist_ok=True)
        shown = [_write_image(one, folder / "images" / one.path.name, trained, name) for one in samples]
        if not shown:
            (folder / "images").rmdir()
        text = card(trained, name, weights[-1].name, [(s.prompt, f"images/{s.path.name}") for s in samples])
        beside += [*shown, put(folder, "README.md", text.encode())]
    return tuple(beside)


def read_samples(folder: Path) -> list[Sample]:
    """Return the images of a folder of samples, as its ``index.json`` lists them; none if there is none."""
    try:
        rows = json.loads((folder / INDEX).read_text())
        return [Sample(folder / Path(r["file"]).name, str(r["prompt"]), int(r["seed"])) for r in rows]
    except FileNotFoundError:
        return []


def usage(trained: Trained, name: str) -> str:
    """Return how it is called in a prompt: its name, and the words that it was taught."""
    return " ".join(filter(None, (_called(trained, name, WEIGHT), trained.spec.dataset.trigger)))


def _called(trained: Trained, name: str, weight: float) -> str:
    match trained.kind:
        case "full" | "textual_inversion":
            return ""
        case "hypernetwork":
            return f"<hypernet:{name}:{weight:g}>"
    return f"<lora:{name}:{weight:g}>"


def _forms(trained: Trained, to: Target) -> list[Form]:
    wanted: dict[Target, list[Form]] = {
        "diffusers": ["diffusers"],
        "kohya": ["kohya"],
        "comfyui": ["kohya"],
        "a1111": ["kohya"],
        "hf": ["diffusers"],
        "dir": ["kohya", "diffusers"],
    }
    if to in ("diffusers", "kohya"):  # somebody who names a form wants that one
        return wanted[to]
    other: dict[Form, Form] = {"diffusers": "kohya", "kohya": "diffusers"}
    read = [other[form] if unreadable(trained, form) else form for form in wanted[to]]
    return list(dict.fromkeys(read))


def _write_image(sample: Sample, target: Path, trained: Trained, name: str) -> Path:
    """Copy a sample, with the text chunk from which A1111 and ComfyUI's managers read how it was made."""
    spec = trained.spec
    samples, side = spec.samples, spec.base.resolution
    info = PngInfo()
    if samples:
        settings = {
            "Steps": samples.steps,
            "Sampler": _SAMPLER.get(trained.family, "DPM++ 2M"),
            "CFG scale": samples.cfg,
            "Seed": sample.seed,
            "Size": f"{side}x{side}",
            "Model": public_name(spec.base.model).rpartition("/")[2],
        }
        lines = [f"{sample.prompt} {_called(trained, name, 1)}".rstrip()]
        lines += [f"Negative prompt: {samples.negative}"] if samples.negative else []
        lines.append(", ".join(f"{key}: {value}" for key, value in settings.items()))
        info.add_itxt("parameters", "\n".join(lines))
    temporary = target.with_name(f".{target.name}.tmp")
    with Image.open(sample.path) as image:
        image.save(temporary, format="PNG", pnginfo=info)
    shutil.move(temporary, target)
    return target


def _a1111(trained: Trained) -> dict[str, Any]:
    """Exactly the keys that A1111 reads from ``NAME.json``."""
    samples = trained.spec.samples
    return {
        "description": _described(trained),
        "sd version": _A1111_VERSION[trained.family],
        "activation text": trained.spec.dataset.trigger or "",
        "preferred weight": WEIGHT,
        "negative text": samples.negative if samples else "",
        "notes": "",
    }


def _manager(trained: Trained, name: str, weights: Path, samples: Sequence[Sample]) -> dict[str, Any]:
    """What ComfyUI's LoRA-Manager keeps beside a file."""
    trigger = trained.spec.dataset.trigger
    return {
        "file_name": weights.stem,
        "model_name": name,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "size": weights.stat().st_size,
        "base_model": _MANAGER_BASE[trained.family],
        "preview_url": f"{name}.png" if samples else "",
        "notes": _described(trained),
        "tags": [],
        "from_civitai": False,
        "civitai": {"trainedWords": [trigger] if trigger else []},
        "usage_tips": json.dumps({"strength": WEIGHT}),
    }


def _described(trained: Trained) -> str:
    return f"{described(trained)}, for {public_name(trained.spec.base.model)}; {trained.step} steps"


def _as_json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"
