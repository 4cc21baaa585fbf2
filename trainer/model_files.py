"""A local base model as files: its digest. Imports no torch."""

import hashlib
from pathlib import Path


def content_digest(path: Path) -> str:
    """Return the sha256 of a file, or for a folder that of its sorted lines ``<sha256>  <name>``.

    Hidden files do not count.
    """
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = {
        child.relative_to(path).as_posix(): child
        for child in path.rglob("*")
        if child.is_file() and not any(part.startswith(".") for part in child.relative_to(path).parts)
    }
    lines = [f"{content_digest(files[name])}  {name}\n" for name in sorted(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def model_digest(path: Path) -> str:
    """Return the digest of a diffusers folder, or of a single file and the configuration beside it."""
    digest = content_digest(path)
    beside = path.with_suffix("")
    if path.is_file() and beside.is_dir():
        return hashlib.sha256(f"{digest}  {content_digest(beside)}\n".encode()).hexdigest()
    return digest
