"""A folder of images with captions: its examples, what is wrong with it, and its digest.

Hidden files do not count. Examples are ordered by their path, so that an example's index means the same on
every machine.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from storage.content.hashing import hashed
from storage.content.store import LocalContent

from ..config import Dataset
from ..errors import BadInput
from .captions import CAPTION_SUFFIXES, METADATA, captions_in
from .concepts import WHOLE, concept_of, unknown_concepts
from .images import CONTROL, MASK, SUFFIXES, is_companion, is_image

_SHOWN = 10
"""How many problems of one kind a message lists."""


@dataclass(frozen=True, slots=True)
class Example:
    """One training image."""

    name: str
    """Path inside the dataset folder, with ``/``."""
    path: Path
    caption: str
    mask: Path | None = None
    """Its mask file, if masks are files and it has one."""
    control: Path | None = None
    """What a ControlNet sees of it, if that is a file."""
    concept: str = WHOLE
    """The subfolder that its settings come from."""
    repeats: int = 1
    """How often it comes in an epoch."""
    loss_weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What a folder holds, by names and captions."""

    examples: tuple[Example, ...] = ()
    missing: tuple[str, ...] = ()
    """Images without a caption: no examples."""
    problems: tuple[str, ...] = ()


def scan(dataset: Dataset, folder: Path) -> list[Example]:
    """Return the examples in ``folder``, ordered by name, with ``[trigger]`` replaced in captions.

    Looks at names and captions, not at pixels.

    Raises:
        BadInput: With everything that is wrong, not only the first thing.
    """
    contents = contents_of(dataset, folder)
    if contents.problems:
        problems = _listed(list(contents.problems))
        raise BadInput(f"dataset {folder}: {problems}", "fix the folder; nothing was trained")
    return list(contents.examples)


def contents_of(dataset: Dataset, folder: Path) -> Contents:
    """Return what a folder holds, and everything that is wrong with its names and captions."""
    if not folder.is_dir():
        return Contents(problems=("no such folder" if not folder.exists() else "not a folder",))
    files = dict(files_in(folder))
    images = {name: path for name, path in files.items() if is_image(name)}
    if not images:
        return Contents(problems=("no PNG, JPEG or WebP image in it",))
    captions, problems = captions_in(folder, images)
    masks, strays = _masks(dataset, images, files)
    controls, uncontrolled = _controls(dataset, images, files)
    examples, missing, untriggered = [], [], False
    for name, path in images.items():
        where, concept = concept_of(dataset, name)
        caption = captions.get(name) or concept.caption or dataset.caption
        if caption is None:
            missing.append(name)
            continue
        trigger = concept.trigger or dataset.trigger
        untriggered |= trigger is None and "[trigger]" in caption
        examples.append(
            Example(
                name=name,
                path=path,
                caption=fill_trigger(caption, trigger),
                mask=masks.get(name),
                control=controls.get(name),
                concept=where,
                repeats=concept.repeats,
                loss_weight=concept.loss_weight,
            )
        )
    if missing and not problems:  # a broken metadata file explains missing captions by itself
        problems.append(f"{len(missing)} of {len(images)} images have no caption: {_listed(missing, ', ')}")
    problems += strays + uncontrolled + unknown_concepts(dataset, images)
    if untriggered:
        problems.append("captions contain [trigger], but dataset.trigger is not set")
    if len(images) - held_out(len(images), dataset.val_fraction) < 1:
        problems.append(
            f"val_fraction {dataset.val_fraction} of {len(images)} images leaves none to train on; "
            "lower it or add images"
        )
    return Contents(examples=tuple(examples), missing=tuple(missing), problems=tuple(problems))


def dataset_content(folder: Path, memory: Path | None = None) -> LocalContent:
    """Return all images, masks, captions and metadata of a folder.

    Args:
        memory: See ``storage.content.hashing``.
    """
    return hashed("", dict(files_in(folder)), memory)


def dataset_digest(folder: Path, memory: Path | None = None) -> str:
    """Return the sha256 over names and contents of all images, masks, captions and metadata.

    It is the digest of the lines ``<sha256 of the file>  <name>`` in the order of names.
    """
    return dataset_content(folder, memory).digest


def held_out(count: int, val_fraction: float) -> int:
    """Return how many of ``count`` images are kept to validate: at least one if the fraction is above 0."""
    return max(1, round(count * val_fraction)) if val_fraction else 0


def fill_trigger(text: str, trigger: str | None) -> str:
    """Replace ``[trigger]`` in a caption or prompt."""
    return text if trigger is None else text.replace("[trigger]", trigger)


def is_part(name: str) -> bool:
    """Whether a file of this name, inside a data set, is part of it."""
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and (path.suffix.lower() in {*SUFFIXES, *CAPTION_SUFFIXES} or name in METADATA)


def files_in(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield every file that is part of a data set, with its name, in the order of names."""
    named = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    for name in sorted(named):
        if is_part(name):
            yield name, named[name]


def _masks(
    dataset: Dataset, images: Mapping[str, Path], files: Mapping[str, Path]
) -> tuple[dict[str, Path], list[str]]:
    """The mask file of each image, and masks that are nobody's or of which an image has two."""
    if dataset.masks != "files":
        return {}, []
    masks, problems = _companions(images, files, MASK, "mask")
    if not masks and not problems:
        problems.append(
            f"dataset.masks is files, but there is no mask: put x{MASK}.png beside x.png, "
            "or set dataset.masks to none"
        )
    return masks, problems


def _controls(
    dataset: Dataset, images: Mapping[str, Path], files: Mapping[str, Path]
) -> tuple[dict[str, Path], list[str]]:
    """The file that a ControlNet sees of each image, and what is wrong: each image must have one."""
    if dataset.control != "files":
        return {}, []
    controls, problems = _companions(images, files, CONTROL, "condition image")
    if missing := [name for name in images if name not in controls]:
        problems.append(
            f"{len(missing)} of {len(images)} images have no condition image x{CONTROL}.png beside x.png: "
            f"{_listed(missing, ', ')}"
        )
    return controls, problems


def _companions(
    images: Mapping[str, Path], files: Mapping[str, Path], ending: str, what: str
) -> tuple[dict[str, Path], list[str]]:
    """What lies beside each image under its name with an ending; what is nobody's, or one of two."""
    by_stem: dict[str, list[str]] = {}
    for name in images:
        by_stem.setdefault(str(PurePosixPath(name).with_suffix("")), []).append(name)
    found: dict[str, Path] = {}
    problems = []
    for name, path in files.items():
        if not is_companion(name, ending):
            continue
        owners = by_stem.get(str(PurePosixPath(name).with_suffix("")).removesuffix(ending), [])
        if not owners:
            problems.append(f"{name} is a {what}, but the image that it would belong to is not there")
        for owner in owners:
            if owner in found:
                problems.append(f"{owner} has two {what}s, {found[owner].name} and {path.name}: keep one")
            found[owner] = path
    return found, problems


def _listed(items: list[str], separator: str = "; ") -> str:
    more = f"{separator}and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return separator.join(items[:_SHOWN]) + more
