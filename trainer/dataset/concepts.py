"""The settings that an image has by the subfolder that it lies in.

A folder right below the data set's that is called like kohya's, ``10_sks dog``, says that its images come ten
times in an epoch, and are called ``sks dog`` where they have no caption. ``dataset.concepts`` says it in
words, for any subfolder, and wins where both do.
"""

import re
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

from ..config import Concept, Dataset

REPEATS = re.compile(r"([1-9][0-9]{0,2})_(.+)")
"""Up to 999: ``2024_paris`` is a year."""
WHOLE = "."
"""The data set's own folder, as a concept."""


def concept_of(dataset: Dataset, name: str) -> tuple[str, Concept]:
    """Return the deepest subfolder that says something of an image, and the settings of all that do.

    A deeper folder wins over one above it, and ``dataset.concepts`` over a folder's own name.

    Args:
        name: Path of the image inside the data set's folder.
    """
    stated = {_normal(key): concept for key, concept in dataset.concepts.items()}
    chosen = WHOLE
    settings: dict[str, Any] = {}
    for folder in reversed(PurePosixPath(name).parents):  # "." first
        said = _said_by_name(folder) if folder.parent == PurePosixPath(WHOLE) else {}
        if concept := stated.get(str(folder)):
            said |= concept.model_dump(include=concept.model_fields_set)
        if said:
            chosen, settings = str(folder), settings | said
    return chosen, Concept.model_validate(settings)


def unknown_concepts(dataset: Dataset, names: Iterable[str]) -> list[str]:
    """Say which concepts name a subfolder in which no image lies."""
    there = {str(folder) for name in names for folder in PurePosixPath(name).parents}
    shown = ", ".join(sorted(there - {WHOLE})[:10]) or "none"
    return [
        f"dataset.concepts names {key!r}, but no image lies there; subfolders with images: {shown}"
        for key in dataset.concepts
        if _normal(key) not in there
    ]


def _said_by_name(folder: PurePosixPath) -> dict[str, Any]:
    named = REPEATS.fullmatch(folder.name)
    return {"repeats": int(named[1]), "caption": named[2].strip()} if named else {}


def _normal(key: str) -> str:
    return str(PurePosixPath(key))
