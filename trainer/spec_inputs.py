"""What a run is made from besides its settings: files and folders that its spec names, with their digests.

A dataset, a base model and adapter files are pinned, uploaded, fetched and checked alike; whoever does one
of these asks here for the list. A new kind of input is a line in ``PLACES``. Imports no torch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from storage.content.store import LocalContent

from .config import RunSpec

EACH = "*"
"""In a place: every element of a list, or every value of a mapping."""

Kind = Literal["images", "model", "files"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where in a spec an input is named."""

    block: tuple[str, ...]
    path_key: str
    digest_key: str
    what: str
    """In messages."""
    kind: Kind
    """``model`` may also be a hub id; the others are paths, or URLs if they contain ``://``."""


PLACES = (
    Place(block=("dataset",), path_key="path", digest_key="digest", what="dataset", kind="images"),
    Place(block=("base",), path_key="model", digest_key="digest", what="base model", kind="model"),
    Place(block=("base", "control"), path_key="model", digest_key="digest", what="ControlNet", kind="model"),
    Place(block=("prior",), path_key="path", digest_key="digest", what="class images", kind="images"),
    Place(
        block=("base",),
        path_key="initial_adapter",
        digest_key="initial_adapter_digest",
        what="initial adapter",
        kind="files",
    ),
    Place(
        block=("base", "merged_adapters", EACH),
        path_key="path",
        digest_key="digest",
        what="merged adapter",
        kind="files",
    ),
    Place(
        block=("command", "inputs", EACH),
        path_key="path",
        digest_key="digest",
        what="input",
        kind="files",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One input of one run."""

    place: Place
    at: tuple[str | int, ...]
    """The block that names it, inside the spec."""
    path: str
    """As it is written: a path, a hub id or a URL."""
    digest: str | None

    @property
    def key(self) -> str:
        """Its name in a sweep file, such as ``base.merged_adapters[0].path``."""
        parts = [
            f"[{part}]" if isinstance(part, int) else f".{part}" for part in (*self.at, self.place.path_key)
        ]
        return "".join(parts).removeprefix(".")

    @property
    def what(self) -> str:
        return self.place.what

    @property
    def is_path(self) -> bool:
        """Whether it says itself that it lies on a disk, and neither on the hub nor behind a URL."""
        if self.place.kind == "model":
            return is_path(self.path)
        return "://" not in self.path

    @property
    def is_here(self) -> bool:
        """Whether there is anything at the path on this machine, right or wrong."""
        try:
            return "://" not in self.path and Path(self.path).expanduser().exists()
        except (OSError, ValueError):  # a name too long, or with a NUL
            return False

    def content(self, path: Path, memory: Path | None = None) -> LocalContent:
        """Return what lies at ``path``, read as this kind of input.

        Args:
            memory: See ``storage.content.hashing``.

        Raises:
            OSError: It cannot be read.
        """
        match self.place.kind:
            case "images":
                from .dataset.folder import dataset_content  # imports Pillow, which few callers need

                return dataset_content(path, memory)
            case "model":
                from .model_files import model_content

                return model_content(path, memory)
            case "files":
                from .command.words import input_content

                return input_content(path, memory)


def inputs_of(spec: RunSpec) -> tuple[Input, ...]:
    """Return the inputs that a spec names, in the order of ``PLACES``."""
    found = []
    for place in PLACES:
        if (spec.command is None) == (place.block[0] == "command"):
            continue  # a command's run has the other blocks too, empty
        for at, block in blocks(spec, place.block):
            if (path := getattr(block, place.path_key)) is not None:
                digest = getattr(block, place.digest_key)
                found.append(Input(place=place, at=at, path=path, digest=digest))
    return tuple(found)


def pinned(spec: RunSpec, pins: Mapping[str, str]) -> RunSpec:
    """Return the spec with the digests of ``pins``, by path, where it names none itself."""
    for named in inputs_of(spec):
        if named.digest is None and (digest := pins.get(named.path)):
            spec = _with(spec, named.at, {named.place.digest_key: digest})
    return spec


def moved(spec: RunSpec, places: Mapping[str, str]) -> RunSpec:
    """Return the spec with the paths of ``places``, by digest, instead of those that are written in it."""
    for named in inputs_of(spec):
        if named.digest and named.digest in places:
            spec = _with(spec, named.at, {named.place.path_key: places[named.digest]})
    return spec


def blocks(value: Any, block: tuple[str, ...]) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Yield where a block lies and the block itself, in a spec or in the JSON of one; none if it is absent.

    What has another shape than a spec is passed over: it will be refused elsewhere, in words.
    """
    if not block:
        if isinstance(value, dict | BaseModel):
            yield (), value
        return
    head, *rest = block
    found: list[tuple[str | int, Any]] = []
    if head == EACH and isinstance(value, list | tuple):
        found = list(enumerate(value))
    elif head == EACH and isinstance(value, dict):
        found = list(value.items())
    elif isinstance(value, dict):
        found = [(head, value.get(head))]
    elif isinstance(value, BaseModel):
        found = [(head, getattr(value, head))]
    for key, part in found:
        for at, inner in blocks(part, tuple(rest)):
            yield (key, *at), inner


def is_path(text: str) -> bool:
    """Whether a base model is named by a path rather than a hub id."""
    return text.startswith(("/", "./", "../", "~"))


def _with(value: Any, at: tuple[str | int, ...], update: Mapping[str, str]) -> Any:
    """Return a copy of a spec in which the block at ``at`` has other values."""
    if not at:
        return value.model_copy(update=dict(update))
    head, rest = at[0], at[1:]
    if isinstance(value, tuple):
        index = int(head)
        return (*value[:index], _with(value[index], rest, update), *value[index + 1 :])
    if isinstance(value, dict):
        return {**value, str(head): _with(value[str(head)], rest, update)}
    return value.model_copy(update={str(head): _with(getattr(value, str(head)), rest, update)})
