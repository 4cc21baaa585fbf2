"""Everything that a checkpoint is exported as, each written and proven by itself.

adapter         ``bundle``
hypernetwork    ``hypernetwork``
full            ``whole``
words           ``tokens``
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import RunSpec
from ..config.trained import Trained as Kind
from ..errors import BadInput
from .bundle import Sample, Target, usage, write_around, write_bundle
from .files import Dtype
from .headers import Amount
from .hypernetwork import trained_hypernetwork, verify_hypernetwork, write_hypernetwork
from .token_files import called
from .tokens import trained_tokens, verify_tokens, write_tokens
from .trained import trained_adapter
from .verify import verify_export
from .whole import NO_SINGLE_FILE, trained_whole, verify_whole, write_whole


@dataclass(frozen=True, slots=True)
class Exported:
    """A file, or the folder of a whole model."""

    path: Path
    found: dict[str, Any]
    """What loading it anew has shown."""
    usage: str
    """How it is called in a prompt."""
    kind: Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """For whom it is written, and how."""

    to: Target
    name: str
    dtype: Dtype = "fp32"
    metadata: Amount = "minimal"
    samples: Sequence[Sample] = ()


def export_checkpoint(checkpoint: Path, spec: RunSpec, folder: Path, wanted: Wanted) -> list[Exported]:
    """Write and verify all that a run trained; the first is what the export is called by.

    Raises:
        BadCheckpoint, BaseUnavailable
        BadInput: Nobody reads it there, or it cannot be written.
        ExportFailed: What was written does not give back what was trained.
    """
    steps = {
        "full": _whole,
        "adapter": _adapter,
        "hypernetwork": _hypernetwork,
        "textual_inversion": _tokens,
    }
    return [
        exported
        for what, export in steps.items()
        if what in spec.base.train
        for exported in export(checkpoint, spec, folder, wanted)
    ]


def _adapter(checkpoint: Path, spec: RunSpec, folder: Path, wanted: Wanted) -> Iterable[Exported]:
    trained = trained_adapter(checkpoint, spec)
    bundle = write_bundle(
        *(trained, folder, wanted.to),
        name=wanted.name,
        dtype=wanted.dtype,
        metadata=wanted.metadata,
        samples=wanted.samples,
    )
    for path in bundle.weights:
        yield Exported(path, verify_export(path, trained), usage(trained, wanted.name), "adapter")


def _hypernetwork(checkpoint: Path, spec: RunSpec, folder: Path, wanted: Wanted) -> Iterable[Exported]:
    own = trained_hypernetwork(checkpoint, spec)
    name, dtype = wanted.name, wanted.dtype
    files = write_hypernetwork(own, folder, wanted.to, name=name, dtype=dtype, metadata=wanted.metadata)
    if "adapter" not in spec.base.train:  # what is around it is there already
        write_around(own.trained, folder, wanted.to, name, files, wanted.samples)
    for path in files:
        found = verify_hypernetwork(path, own, dtype)
        yield Exported(path, found, usage(own.trained, name), "hypernetwork")


def _tokens(checkpoint: Path, spec: RunSpec, folder: Path, wanted: Wanted) -> Iterable[Exported]:
    own = trained_tokens(checkpoint, spec)
    name, dtype = wanted.name, wanted.dtype
    files = write_tokens(
        *(own, folder, wanted.to, spec.base), name=name, dtype=dtype, metadata=wanted.metadata
    )
    if spec.base.train == ("textual_inversion",):
        write_around(own.trained, folder, wanted.to, name, list(files.values()), wanted.samples)
    for word, path in files.items():
        found = verify_tokens(word, path, own, dtype)
        yield Exported(path, found, called(word, path.stem, wanted.to), "textual_inversion")


def _whole(checkpoint: Path, spec: RunSpec, folder: Path, wanted: Wanted) -> Iterable[Exported]:
    if wanted.to not in ("diffusers", "hf", "dir"):
        raise BadInput(*NO_SINGLE_FILE)
    trained = trained_whole(checkpoint, spec)
    write_whole(trained, checkpoint, folder, wanted.dtype)
    if wanted.to != "diffusers":
        write_around(trained, folder, "hf", wanted.name, [folder], wanted.samples)
    found = verify_whole(folder, trained, checkpoint, wanted.dtype)
    yield Exported(folder, found, usage(trained, wanted.name), "full")
