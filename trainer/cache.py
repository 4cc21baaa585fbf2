"""Computed tensors, kept by the content they were computed from.

An entry is a safetensors file that appears by rename and carries the digest of its tensors; one that is
damaged or unreadable is computed again. Several processes may share the folder: equal keys have equal
contents.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from torch import Tensor

from . import tensor_file
from .randomness import own_memory
from .rundir import Options, cache_folder

FORMAT = 3
"""Part of every key: raise it when an entry's meaning changes."""

_UNFINISHED = ".tmp-"
"""Begins the names of files that are being written."""


def cache_key(**parts: str | int | float | bool | list[int] | list[list[int]]) -> str:
    """Return the name of an entry: everything its content depends on, hashed."""
    return hashlib.sha256(json.dumps({"format": FORMAT, **parts}, sort_keys=True).encode()).hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 over names, types, shapes and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous().cpu()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(cast(bytes, tensor.reshape(-1).view(torch.uint8).numpy().data))
    return digest.hexdigest()


def default_cache_dir() -> Path:
    return cache_folder(Options())


class Cache:
    """A folder of computed tensors."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def remove_unfinished(self, *, before: float) -> None:
        """Remove what a killed process left half written before a time, in seconds since the epoch."""
        for path in self._folder.glob(f"*/{_UNFINISHED}*"):
            with contextlib.suppress(OSError):  # another process may be at it, too
                if path.stat().st_mtime < before:
                    path.unlink()

    def through(self, key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the entry, computing and keeping it if it is not there or damaged.

        Either way the tensors are alike down to their place in memory, see ``own_memory``.
        """
        found = _read(self._path(key))
        if found is not None:
            return found
        computed = {name: own_memory(tensor) for name, tensor in compute().items()}
        try:
            _write(self._path(key), computed)
        except OSError as error:  # a full or read-only disk costs time at the next start, not this run
            print(f"cache: {self._path(key)} not written: {error}", flush=True)
        return computed

    def keep(self, key: str, compute: Callable[[], dict[str, Tensor]]) -> None:
        """Make sure that the entry is there and whole, computing it if it is not.

        Raises:
            OSError: It cannot be written.
        """
        if _read(self._path(key)) is None:
            _write(self._path(key), {name: own_memory(tensor) for name, tensor in compute().items()})

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.safetensors"


def _read(path: Path) -> dict[str, Tensor] | None:
    try:
        tensors, metadata = tensor_file.read(path)
    except (OSError, SafetensorError):
        return None
    if metadata.get("digest") != tensors_digest(tensors):
        return None
    return {name: own_memory(tensor) for name, tensor in tensors.items()}


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=_UNFINISHED)
    os.close(handle)
    try:
        tensor_file.write(Path(temporary), tensors, {"digest": tensors_digest(tensors)})
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
