"""A whole model as a diffusers folder, which is there complete or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from storage.local import temporary_dir

from ..errors import BadInput

INDEX = "model_index.json"


def check_replaceable(folder: Path) -> None:
    """
    Raises:
        BadInput: Something is there that is no diffusers folder: it is not replaced.
    """
    if folder.exists() and not (folder / INDEX).is_file():
        raise BadInput(f"{folder} is no diffusers folder: it is not replaced", "give another --out")


def write_pipeline(pipeline: Any, folder: Path) -> None:
    """Write a pipeline as safetensors; a folder of this name is replaced.

    Raises:
        BadInput: A weight is not finite, or it cannot be written.
    """
    _check_finite(pipeline)
    with appearing(folder) as temporary:
        pipeline.save_pretrained(temporary, safe_serialization=True)


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """Give a folder to write into, which takes the place of ``folder`` when all is written.

    Raises:
        BadInput: It cannot be written; what was there stays.
    """
    try:
        temporary = temporary_dir(folder.parent)
    except OSError as error:
        raise BadInput(f"{folder} cannot be written: {error.strerror or error}") from error
    try:
        new = temporary / "new"
        new.mkdir()
        yield new
        _exchange(new, folder, temporary / "before")
    except OSError as error:
        raise BadInput(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _exchange(new: Path, folder: Path, before: Path) -> None:
    """Let a folder take the place of another, which goes to ``before``; if it cannot, put that back."""
    if folder.exists():
        folder.rename(before)
    try:
        new.rename(folder)
    except OSError:
        if before.exists():
            before.rename(folder)
        raise


def _check_finite(pipeline: Any) -> None:
    for name, part in pipeline.components.items():
        for key, tensor in part.state_dict().items() if isinstance(part, nn.Module) else ():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                hint = "give a smaller weight of what is merged, or another --dtype"
                raise BadInput(f"{name}.{key} would hold NaN or infinity", hint)
