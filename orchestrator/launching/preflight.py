"""Looks at everything that a sweep names before anything is launched: data, models, programs, the store.

What is found here would otherwise end every run of the sweep after its GPU was paid for. Errors stop the
launch; warnings are for the person to read. What only a node can know, such as whether the hub lets it
download a model, is found there and fails the run at once, without retries.
"""

import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar
from urllib.parse import parse_qs, urlsplit

from storage.errors import AccessDenied, StorageError, Unavailable
from storage.object_store import ObjectStore
from storage.probe import write_check
from trainer.config import Base, Dataset, Evaluate
from trainer.dataset_files import SUFFIXES, dataset_digest, held_out, problems

from ..errors import STORE_DENIED, STORE_UNREACHABLE, PreflightFailed, Problem, shown
from ..grid.sweep import Sweep
from .own_command import command_problems, program_problems, script_problems

T = TypeVar("T")

PIPELINES = ("StableDiffusionPipeline",)
"""What the trainer's families can load. Known here too, because asking them imports torch."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def check(
    sweep: Sweep, store: ObjectStore, *, installed: Callable[[str], bool] | None = None
) -> list[Problem]:
    """Return what is wrong, or worth a warning, before the sweep is launched.

    Writes, reads and deletes one small object in the store. Decodes every image of every dataset.

    Args:
        installed: Whether a Python package can be imported; by default asks this interpreter.
    """
    specs = [run.spec for run in sweep.runs if run.spec.command is None]
    images = {path: _images(Path(path)) for path in _distinct(spec.dataset.path for spec in specs)}
    found: list[Problem] = []
    for dataset in _distinct(_as_files(spec.dataset) for spec in specs):
        found += _dataset(dataset)
    for model, revision in _distinct((spec.base.model, spec.base.revision) for spec in specs):
        found += _model(model, revision)
    for evaluate in _distinct(spec.evaluate for spec in specs if spec.evaluate):
        found += _command(evaluate)
    for spec in specs:
        found += _training(spec.base, sweep, installed or _installed)
    for dataset, base in _distinct((_as_files(spec.dataset), spec.base) for spec in specs):
        found += _batch(base, dataset, images[dataset.path])
    for command in _distinct(run.spec.command for run in sweep.runs if run.spec.command):
        found += command_problems(command, sweep.checkpoint.policy)
    return _distinct([*found, *_ranking(sweep), *_store(store)])


def refuse(problems: Iterable[Problem]) -> None:
    """Raise if there is an error among the problems.

    Raises:
        PreflightFailed: With all of them, warnings too.
    """
    problems = tuple(problems)
    if any(not problem.is_warning for problem in problems):
        raise PreflightFailed(problems)


def _as_files(dataset: Dataset) -> Dataset:
    """The dataset without what only changes how its files are used: each folder is decoded once."""
    return dataset.model_copy(update={"caption_dropout": 0.0, "random_flip": False, "center_crop": True})


def _dataset(dataset: Dataset) -> Iterator[Problem]:
    folder = Path(dataset.path)
    if "://" in dataset.path:
        hint = "download it, and give the folder"
        yield Problem("E2201", f"{shown(dataset.path)} is not a local folder", "dataset.path", hint)
    elif not folder.is_dir():
        message = f"dataset folder {folder} {'is not a folder' if folder.exists() else 'does not exist'}"
        yield Problem(
            "E2201", message, "dataset.path", "relative paths start at the folder of the sweep file"
        )
    else:
        wrong = problems(dataset)
        for text in wrong:
            yield Problem("E2202", f"dataset {folder}: {text}", "dataset")
        if not wrong and (dataset.digest is None or dataset_digest(folder) != dataset.digest):
            message = f"dataset {folder} has other content than the sweep was made for"
            yield Problem("E2203", message, "dataset.digest", "leave the folder alone while it is submitted")


def _model(model: str, revision: str | None) -> Iterator[Problem]:
    path = Path(model)
    if path.suffix in _PICKLES:
        message = f"base model {model} may contain code that runs when it is loaded"
        yield Problem("E2302", message, "base.model", "convert it to .safetensors first")
    elif path.is_absolute():
        yield from _local_model(path)
    elif path.suffix == ".safetensors" or not _HUB_ID.fullmatch(model) or len(model) > 96:
        hint = "a local path, or a hub id such as owner/name"
        yield Problem(
            "E2301", f"base model {shown(model)} is neither a file nor a hub id", "base.model", hint
        )
    elif revision is None:
        message = f"base model {model} is not pinned: its owner can change what is trained"
        yield Problem("W2306", message, "base.revision", "set it to a commit of the repository")


def _local_model(path: Path) -> Iterator[Problem]:
    if not path.exists():
        hint = "relative paths start at the folder of the sweep file"
        yield Problem("E2301", f"base model {path} does not exist", "base.model", hint)
    elif path.is_file():
        if path.suffix != ".safetensors":
            yield Problem("E2302", f"base model {path} is not a .safetensors file", "base.model")
    elif (kind := _pipeline(path)) not in PIPELINES:
        what = f"is a {kind}" if kind else "has no readable model_index.json: it is not a diffusers model"
        hint = f"the trainer loads {', '.join(PIPELINES)}"
        yield Problem("E2303", f"base model {path} {what}", "base.model", hint)
    elif not any((path / "unet").glob("*.safetensors")):
        hint = "save it with safe_serialization=True"
        yield Problem("E2304", f"base model {path} has no safetensors weights in unet/", "base.model", hint)


def _pipeline(folder: Path) -> str | None:
    try:
        name = json.loads((folder / "model_index.json").read_bytes())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(name)


def _command(evaluate: Evaluate) -> Iterator[Problem]:
    where = "evaluate.command"
    program, *words = evaluate.command
    yield from program_problems(program, where, "e.g. [python, score.py, '{samples}']")
    yield from script_problems(tuple(words), where)
    if not any("{samples}" in word for word in evaluate.command):
        message = "the command is not told where the samples are"
        yield Problem("W2323", message, where, "add the argument '{samples}'")


def _training(base: Base, sweep: Sweep, installed: Callable[[str], bool]) -> Iterator[Problem]:
    every = sweep.checkpoint.policy.every_steps
    if base.optimizer == "adamw8bit" and not installed("bitsandbytes"):
        message = "optimizer adamw8bit needs bitsandbytes, which is not installed"
        yield Problem("E2311", message, "base.optimizer", "pip install bitsandbytes, or use adamw")
    if base.learning_rate > 1:
        message = f"learning rate {base.learning_rate:g} is above 1, adapters train at about 1e-4"
        yield Problem("W2312", message, "base.learning_rate")
    if every is not None and base.max_train_steps <= every:
        message = f"runs of {base.max_train_steps} steps save nothing before their end, every {every} steps"
        yield Problem("W2313", message, "checkpoint.every", "save more often, or by time: 120s")


def _batch(base: Base, dataset: Dataset, images: int) -> Iterator[Problem]:
    count = images - held_out(images, dataset.val_fraction)
    if 0 < count < base.samples_per_step:
        message = f"a step sees {base.samples_per_step} images, but the dataset has {count} to train on"
        yield Problem("W2314", message, "base.train_batch_size", "the same images repeat within a step")


def _images(folder: Path) -> int:
    if not folder.is_dir():
        return 0
    return sum(path.suffix.lower() in SUFFIXES for path in folder.rglob("*") if not path.name.startswith("."))


def _ranking(sweep: Sweep) -> Iterator[Problem]:
    if sweep.metric is None:
        if any(run.spec.command for run in sweep.runs):
            message = "nothing will rank the runs: no metric is named"
            hint = "name a number of the JSON object that the command prints last"
        else:
            message = "nothing will rank the runs: no image is held out, and no metric is named"
            hint = "set dataset.val_fraction, or metric and evaluate"
        yield Problem("W2315", message, "metric", hint)
    if sweep.left_out:
        message = f"run_cap leaves out {sweep.left_out} of {sweep.left_out + len(sweep.runs)} runs"
        yield Problem("W2316", message, "run_cap")


def _store(store: ObjectStore) -> Iterator[Problem]:
    endpoint = parse_qs(urlsplit(store.url).query).get("endpoint", [""])[0]
    if endpoint.startswith("http://") and urlsplit(endpoint).hostname not in _LOOPBACK:
        message = "the store is reached over http: data and credentials' signatures can be read on the way"
        yield Problem("W2405", message, "storage.url", "use https")
    denied = "the credentials must allow to put, get, list and delete"
    unreachable = "check the endpoint and network"
    if store.url.startswith("file:"):
        denied = unreachable = "name a folder that can be made and written to, on a disk with room"
    try:
        write_check(store)
    except AccessDenied as error:
        yield Problem(STORE_DENIED, f"{store.url}: {error}", "storage.url", denied)
    except Unavailable as error:
        yield Problem(STORE_UNREACHABLE, f"{store.url}: {error}", "storage.url", unreachable)
    except StorageError as error:
        yield Problem("E2401", f"{store.url}: {error}", "storage.url")


def _distinct(values: Iterable[T]) -> list[T]:
    # Blocks with mappings in them have no hash.
    return list({repr(value): value for value in values}.values())


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
