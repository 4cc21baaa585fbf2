"""A data set on the hub, exported into a folder: images as they are stored there, captions as metadata.

``datasets`` reads it, row by row: no more than one image is in memory. No code that ships with a data set is
run. A revision is resolved to its commit before anything is read.
"""

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import BadInput, BaseUnavailable, NodeUnfit, TrainerError
from ..hub_transfer import broke_off
from .captions import METADATA
from .images import SUFFIXES
from .sources import Source

_NAME = re.compile(r"hub://([A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB = "hf://datasets/"
"""How ``datasets`` names files on the hub, perhaps behind ``zip://name::``."""
_HINT = "dataset.path is a local folder, hub://owner/name, or s3://bucket/prefix"


class HubDataset:
    """See ``sources.Remote``."""

    size_bytes = 0

    def __init__(self, source: Source) -> None:
        """
        Raises:
            BadInput: There is no such data set or revision.
            NodeUnfit: ``datasets`` is not installed.
            BaseUnavailable: The hub did not answer.
        """
        match = _NAME.fullmatch(source.path)
        if match is None:
            raise BadInput("dataset hub://…: not of the form hub://owner/name", _HINT)
        self._id, self._source = match[1], source
        _library()
        pinned = source.revision is not None and _COMMIT.fullmatch(source.revision)
        self.revision: str | None = source.revision if pinned else _commit(self._id, source.revision)

    def identity(self) -> list[object]:
        source = self._source
        return ["hub", self._id, self.revision, source.split, source.image_column, source.caption_column]

    def fetch(self, target: Path, alive: Callable[[], None]) -> None:
        source = self._source
        try:
            rows = _library().load_dataset(
                self._id, split=source.split, revision=self.revision, streaming=True
            )
            export(rows, source, target, alive)
        except TrainerError:
            raise
        except Exception as error:
            raise _translated(source.path, error) from error


def export(
    rows: Any,
    source: Source,
    target: Path,
    alive: Callable[[], None] = lambda: None,
    within: str = _HUB,
) -> None:
    """Write each row of a ``datasets.IterableDataset`` as an image file, and the captions as metadata.

    Args:
        within: How the places begin at which a row may say that its image lies.

    Raises:
        BadInput: There are no such columns, or a row has no image that can be trained on.
    """
    features = rows.features or {}
    image, caption = source.image_column, source.caption_column
    shown = ", ".join(f"{name} ({kind.__class__.__name__})" for name, kind in features.items()) or "not known"
    kind = _library().Image
    if not isinstance(features.get(image), kind):
        raise BadInput(
            f"dataset {source.path}: column {image!r} holds no images; its columns: {shown}",
            "set dataset.image_column",
        )
    metadata = []
    for name, row in _images(rows.decode(False), source, target, within):
        if isinstance(row.get(caption), str):
            metadata.append(json.dumps({"file_name": name, "text": row[caption]}, ensure_ascii=False))
        elif row.get(caption) is not None:
            raise BadInput(
                f"dataset {source.path}: column {caption!r} holds no texts; its columns: {shown}",
                "set dataset.caption_column",
            )
        alive()
    if metadata:
        (target / METADATA[0]).write_text("\n".join(metadata) + "\n", "utf-8")


def _images(rows: Any, source: Source, target: Path, within: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for index, row in enumerate(rows):
        image = row[source.image_column] or {}
        place = str(image.get("path") or "")
        # Whoever made the data set wrote this: a path of this machine, or any address, is none of theirs.
        if image.get("bytes") is None and place and not place.rpartition("::")[2].startswith(within):
            raise BadInput(
                f"dataset {source.path}: row {index} names an image outside of the data set, {place[:200]}",
                "export it yourself, and give the folder",
            )
        body = _body(image)
        suffix = _suffix(body)
        if suffix is None:
            raise BadInput(
                f"dataset {source.path}: row {index} holds no PNG, JPEG or WebP image",
                "export it yourself, and give the folder",
            )
        name = f"{index:06d}{suffix}"
        (target / name).write_bytes(body)
        yield name, row


def _body(image: dict[str, Any]) -> bytes:
    if image.get("bytes") is not None or not image.get("path"):
        return bytes(image.get("bytes") or b"")
    from datasets.utils.file_utils import xopen  # opens what lies beside a data set's own files on the hub

    with xopen(image["path"], "rb") as file:
        return bytes(file.read())


def _suffix(body: bytes) -> str | None:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(body)) as image:
            kind = image.format
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
        return None
    return next((suffix for suffix, format in SUFFIXES.items() if format == kind), None)


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise NodeUnfit(
            "data sets on the hub need the package datasets, which is not installed here",
            "pip install 'orchestrate-loras[hub]', or give a local folder",
        ) from error
    datasets.disable_progress_bars()
    return datasets


def _commit(name: str, revision: str | None) -> str:
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name, revision=revision).sha)
    except Exception as error:
        raise _translated(f"hub://{name}", error, revision) from error


def _translated(path: str, error: Exception, revision: str | None = None) -> BadInput | BaseUnavailable:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    named = f"dataset {path}" + (f" at revision {revision}" if revision else "")
    if isinstance(error, GatedRepoError):
        return BadInput(f"{named} is gated", "accept its licence on huggingface.co, then `hf auth login`")
    if isinstance(error, RevisionNotFoundError):
        return BadInput(f"{named}: the hub has no such revision", "dataset.revision is a commit")
    if isinstance(error, RepositoryNotFoundError):
        return BadInput(f"{named}: there is no such data set on the hub, or it is private", _HINT)
    if constants.HF_HUB_OFFLINE:
        return BadInput(f"{named}: HF_HUB_OFFLINE is set", "allow the hub, or give a local folder")
    if broke_off(error):
        return BaseUnavailable(
            f"{named}: the hub did not answer: {type(error).__name__}: {error}",
            "try again, or give a local folder",
        )
    return BadInput(f"{named} cannot be read: {error}", _HINT)
