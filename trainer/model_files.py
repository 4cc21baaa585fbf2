"""A local base model as files, and its digest. Imports no torch."""

from pathlib import Path

from storage.content.hashing import hashed
from storage.content.store import LocalContent


def content_digest(path: Path) -> str:
    """Return the sha256 of a file, or for a folder that of its sorted lines ``<sha256>  <name>``.

    Hidden files do not count.
    """
    if path.is_file():
        return hashed(path.name, {path.name: path}).digest
    return hashed("", _files(path)).digest


def model_content(path: Path, memory: Path | None = None) -> LocalContent:
    """Return a diffusers folder, or a single file and the configuration beside it.

    Args:
        memory: See ``storage.content.hashing``.
    """
    if not path.is_file():
        return hashed("", _files(path), memory)
    beside = path.with_suffix("")
    files = {f"{beside.name}/{name}": file for name, file in _files(beside).items()}
    return hashed(path.name, {path.name: path, **files}, memory)


def model_digest(path: Path, memory: Path | None = None) -> str:
    """Return the digest of a diffusers folder, or of a single file and the configuration beside it."""
    return model_content(path, memory).digest


def _files(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        return {}
    names = {child.relative_to(folder): child for child in folder.rglob("*") if child.is_file()}
    return {
        name.as_posix(): child
        for name, child in names.items()
        if not any(part.startswith(".") for part in name.parts)
    }
