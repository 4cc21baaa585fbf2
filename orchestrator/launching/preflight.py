"""Looks at everything that a sweep names before anything is launched: data, models, programs, the store.

What is found here would otherwise end every run of the sweep after its GPU was paid for. Errors stop the
launch; warnings are for the person to read. What only a node can know, such as whether the hub lets it
download a model, is found there and fails the run at once, without retries.
"""

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar
from urllib.parse import parse_qs, urlsplit

from storage.errors import AccessDenied, StorageError, Unavailable
from storage.object_store import ObjectStore
from storage.probe import write_check
from trainer.config import Base, Evaluate

from ..errors import STORE_DENIED, STORE_UNREACHABLE, PreflightFailed, Problem
from ..grid.sweep import Sweep
from .adapters import adapter_problems
from .base_model import base_model_problems
from .class_images import class_image_problems
from .data import dataset_problems
from .own_command import command_problems, program_problems, script_problems

T = TypeVar("T")

_PACKAGES = {"adamw8bit": "bitsandbytes", "lion": "bitsandbytes", "prodigy": "prodigyopt"}
"""What optimizers need beside torch and transformers."""
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def check(
    sweep: Sweep, store: ObjectStore, *, installed: Callable[[str], bool] | None = None
) -> list[Problem]:
    """Return what is wrong, or worth a warning, before the sweep is launched.

    Writes, reads and deletes one small object in the store. Fetches remote datasets, and decodes every image.

    Args:
        installed: Whether a Python package can be imported; by default asks this interpreter.
    """
    specs = [run.spec for run in sweep.runs if run.spec.command is None]
    found = list(dataset_problems(specs))
    found += class_image_problems(specs)
    found += base_model_problems(spec.base for spec in specs)
    found += adapter_problems(specs)
    for evaluate in _distinct(spec.evaluate for spec in specs if spec.evaluate):
        found += _command(evaluate)
    for spec in specs:
        found += _training(spec.base, sweep, installed or _installed)
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
    package = _PACKAGES.get(base.optimizer)
    if package and not installed(package):
        message = f"optimizer {base.optimizer} needs {package}, which is not installed"
        yield Problem("E2311", message, "base.optimizer", f"pip install {package}, or use adamw")
    if base.quantize == "nf4" and not installed("bitsandbytes"):
        message = "nf4 needs bitsandbytes, which is not installed"
        yield Problem("E2311", message, "base.quantize", "pip install bitsandbytes, or use int8")
    if base.learning_rate > 1:
        message = f"learning rate {base.learning_rate:g} is above 1, adapters train at about 1e-4"
        yield Problem("W2312", message, "base.learning_rate")
    if every is not None and base.max_train_steps <= every:
        message = f"runs of {base.max_train_steps} steps save nothing before their end, every {every} steps"
        yield Problem("W2313", message, "checkpoint.every", "save more often, or by time: 120s")


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
