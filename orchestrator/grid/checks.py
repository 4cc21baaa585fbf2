"""Rules of a sweep file that concern more than one value."""

from collections.abc import Iterable
from urllib.parse import urlsplit

from storage.errors import InvalidName
from storage.url import open_store
from trainer.config import RunSpec

from ..errors import Problem, shown, suggest
from .file import Document
from .schema import METHODS, Grid

HELD_OUT_LOSS = "val/loss"
BUILT_IN_METRICS = (HELD_OUT_LOSS, "train/loss")
"""What the trainer measures by itself."""


def grid_problems(document: Document, grid: Grid) -> list[Problem]:
    """Return what is wrong with a sweep file apart from its parameters and training keys."""
    return [
        *_version(document, grid),
        *_method(document, grid),
        *_metric(document, grid),
        *_storage(document, grid),
    ]


def _version(document: Document, grid: Grid) -> list[Problem]:
    if grid.version == 1:
        return []
    newer = grid.version > 1
    message = f"version {grid.version} is {'newer than' if newer else 'not'} what this orchestrate reads, 1"
    hint = "upgrade orchestrate" if newer else "write version: 1"
    return [Problem("E2112", message, document.where(("version",)), hint)]


def _method(document: Document, grid: Grid) -> list[Problem]:
    if grid.method == "grid":
        return []
    where = document.where(("method",))
    if grid.method in METHODS:
        message = f"method '{grid.method}' is not supported: grid is what this version supports"
        return [Problem("E2113", message, where, "write method: grid and list the values")]
    return [Problem("E2113", f"unknown method {shown(grid.method)}", where, suggest(grid.method, METHODS))]


def _metric(document: Document, grid: Grid) -> list[Problem]:
    """A command may report any name; without one, only the built-in ones are measured."""
    if grid.metric is None or "evaluate" in document.data or "command" in document.data:
        return []
    name, path = grid.metric.name, ("metric", "name")
    if name not in BUILT_IN_METRICS:
        hint = suggest(name, BUILT_IN_METRICS) or f"use {HELD_OUT_LOSS}, or add an evaluate command"
        return [Problem("E2119", f"nothing reports the metric {shown(name)}", document.where(path), hint)]
    if name == HELD_OUT_LOSS and grid.dataset.get("val_fraction") == 0:
        message = f"{HELD_OUT_LOSS} is measured on held-out images, but dataset.val_fraction is 0"
        return [Problem("E2119", message, document.where(path), "set dataset.val_fraction, e.g. 0.1")]
    return []


def _storage(document: Document, grid: Grid) -> list[Problem]:
    if grid.storage is None:
        return []
    message = url_problem(grid.storage.url)
    where = document.where(("storage", "url"))
    if message:
        return [Problem("E2121", message, where)]
    if grid.storage.credentials == "scoped" and not grid.storage.url.lower().startswith("s3://"):
        message = "credentials: scoped needs a bucket: a folder has no credentials to keep from its nodes"
        where = document.where(("storage", "credentials"))
        return [Problem("E2125", message, where, "use s3://bucket/prefix, or leave credentials out")]
    return []


def idle_gpus(document: Document, grid: Grid, specs: Iterable[RunSpec]) -> list[Problem]:
    """Return what is wrong if a step has fewer images than there are GPUs to share them."""
    processes = grid.resources.processes
    fewest = min((s.base.samples_per_step for s in specs if s.command is None), default=processes)
    if fewest >= processes:
        return []
    message = f"resources.gpus is {processes}, but a step has {fewest} image(s) to share among them"
    hint = "raise base.train_batch_size or base.gradient_accumulation_steps, or lower resources.gpus"
    return [Problem("E2111", message, document.where(("resources", "gpus")), hint)]


def url_problem(url: str) -> str | None:
    """Say what is wrong with a store's url, if anything; a bucket's options are read when it is opened."""
    if url.lower().startswith("s3://"):
        # Opening a bucket imports boto3, which takes longer than everything else here.
        return None if urlsplit(url).netloc else "store url: the bucket's name is missing, s3://bucket/prefix"
    if url.lower().startswith("memory://"):
        return "store url: memory:// lives in one process only; use file:///path or s3://bucket/prefix"
    try:
        open_store(url)
    except InvalidName as error:
        return str(error)
    except RuntimeError:  # pathlib's, for the home of nobody
        return f"store url {shown(url)}: there is no such home folder"
    return None
