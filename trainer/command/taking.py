"""Makes a checkpoint of ours out of a program's files, by hard links: nothing is copied, nothing is read but
to hash it.

A checkpoint holds the program's own under its name below ``{out}``: ``checkpoint-50/optimizer.bin``.
Restoring it moves it there again. A file that the program writes to in place after all is noticed: while it
is hashed by a second look, later by its digest, when it is uploaded.
"""

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from storage.local import (
    MANIFEST,
    Manifest,
    hash_files,
    seal,
    step_dir,
    temporary_dir,
)

from ..errors import BadCheckpoint, BadInput
from .folders import Entry, entries


def take(
    root: Path,
    step: int,
    files: Mapping[str, Path],
    *,
    metrics: Mapping[str, float],
    final: bool,
    unchanged: Callable[[], bool] = lambda: True,
) -> bool:
    """Put files, by their names in it, into a checkpoint under ``root``, which appears whole or not at all.

    Args:
        unchanged: Asked once everything is hashed.

    Returns:
        Whether it is there: False if the files have changed meanwhile.

    Raises:
        InvalidName: It can never be stored: see ``storage.local.hash_files``.
        OSError: The disk is full, or a file is gone.
    """
    temporary = temporary_dir(root)
    try:
        for name, path in files.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            _link(path, temporary / name)
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        stored = hash_files(temporary, metrics=finite)
        if not unchanged():
            return False
        manifest = Manifest(step=step, final=final, metrics=finite, files=stored)
        seal(temporary, manifest, root / step_dir(step))
        return True
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def files_of(entry: Path, out: Path) -> dict[str, Path]:
    """Return the files of a folder, or the one file, by their names below ``out``.

    Raises:
        BadInput: A link leads out of ``out``: what it leads to would not be there on another node.
    """
    found = [entry] if entry.is_file() else [p for p in sorted(entry.rglob("*")) if not p.is_dir()]
    for path in found:
        if path.is_symlink() and not path.resolve().is_relative_to(out.resolve()):
            raise BadInput(f"{path.relative_to(out)} is a link to {path.resolve()}, outside of {{out}}")
    return {path.relative_to(out).as_posix(): path.resolve() if path.is_symlink() else path for path in found}


def result_files(out: Path, patterns: tuple[str, ...], checkpoints: str) -> dict[str, Path]:
    """Return the files of the result by their names below ``out``; those of checkpoints are none of it.

    Raises:
        BadInput: A pattern matches nothing.
    """
    within = [entry.path for entry in entries(out, checkpoints)]
    found: dict[str, Path] = {}
    for pattern in patterns:
        hits = [path for path in out.glob(pattern) if not any(path.is_relative_to(w) for w in within)]
        files = {name: path for hit in hits for name, path in files_of(hit, out).items()}
        if not files:
            there = ", ".join(sorted(path.name for path in out.iterdir())[:10]) or "nothing"
            raise BadInput(
                f"the command ended with exit code 0, but nothing matches command.result {pattern!r}",
                f"in its output folder there is: {there}",
            )
        found |= files
    return found


def restore(checkpoint: Path, out: Path, pattern: str, step: int) -> Entry:
    """Move a fetched checkpoint to where the program had it, and return it.

    Raises:
        BadCheckpoint: There is nothing of that name in it.
    """
    for child in checkpoint.iterdir():
        if child.name != MANIFEST:
            os.rename(child, out / child.name)
    for entry in entries(out, pattern):
        if entry.step == step:
            return entry
    raise BadCheckpoint(f"{checkpoint}: it holds nothing named {pattern} of step {step}")


def _link(path: Path, target: Path) -> None:
    with contextlib.suppress(OSError):
        os.link(path, target)
        return
    shutil.copyfile(path, target)  # some file systems have no hard links
