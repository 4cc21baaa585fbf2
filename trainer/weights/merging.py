"""Adapters added to the weights of a base model, in fp32, and the model written as a diffusers folder."""

from collections.abc import Sequence
from pathlib import Path

from ..config import Base, MergedAdapter
from ..errors import BadInput
from ..export.files import DTYPES, Dtype
from ..export.pipeline_folder import check_replaceable, write_pipeline
from ..families.source import load_pipeline
from .combining import weighted
from .lora_file import read_lora


def merge(
    model: str, adapters: Sequence[str], out: Path, *, dtype: Dtype | None = None, force: bool = False
) -> Path:
    """Write a base with adapters merged into it and return its folder, there complete or not at all.

    Every kind of adapter can be merged, DoRA, LoHa and LoKr too. The safety checker is left out.

    Args:
        model: A diffusers folder, a single file or a hub id.
        adapters: ``FILE`` or ``FILE:WEIGHT`` each; later ones change what earlier ones left.
        dtype: By default that of the base.
        force: Replace a folder that is there.

    Raises:
        BadInput: The folder is there, a file is no adapter of this base, or it cannot be written.
        BaseUnavailable
    """
    _check_folder(out, model, force=force)
    merged = []
    for word in adapters:
        path, weight = weighted(word)
        read_lora(path)  # names what is wrong by its key, before gigabytes are read
        merged.append(MergedAdapter(path=str(path), weight=weight))
    pipeline = load_pipeline(Base(model=model, merged_adapters=tuple(merged)))
    write_pipeline(pipeline.to(DTYPES[dtype]) if dtype else pipeline, out)
    return out


def _check_folder(out: Path, model: str, *, force: bool) -> None:
    base = Path(model).expanduser()
    if base.exists() and out.exists() and out.resolve() == base.resolve():
        raise BadInput(f"--out {out} is the base itself", "write into another folder")
    if out.exists() and not force:
        raise BadInput(f"{out} is there already", "give --force to replace it, or another --out")
    check_replaceable(out)
