"""``python -m trainer lora``: each tool's arguments to its function, and what it found to lines."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .tools import FORMS, group

if TYPE_CHECKING:
    from ..export.files import Dtype
    from .combining import Ranks
    from .lora_file import Form, LoraFile

_RANKS = ("rank", "threshold", "ratio", "cumulative", "frobenius")


def _inspect(file: Path, keys: bool, as_json: bool) -> None:
    from .inspecting import in_lines, inspect

    found = inspect(file)
    if as_json:
        click.echo(json.dumps(found))
    else:
        for line in in_lines(found, keys=keys):
            click.echo(line)


def _convert(file: Path, out: Path, to: str, dtype: "Dtype | None", fold: bool, force: bool) -> None:
    from .writing import convert

    click.echo(convert(file, out, FORMS[to], dtype=dtype, fold=fold, force=force))  # type: ignore[arg-type]


def _resize(file: Path, out: Path, **options: Any) -> None:
    from .combining import relative_error, resized
    from .lora_file import read_lora
    from .writing import check_target

    check_target(out, _form(options), force=options["force"])
    lora = read_lora(file)
    smaller = resized(lora, _ranks(options))
    click.echo(f"{_ranks_of(smaller)}; error of the change {relative_error(lora, smaller):.2e}")
    click.echo(_written(smaller, out, options))


def _mix(files: tuple[str, ...], out: Path, **options: Any) -> None:
    from .combining import mixed, read_weighted, relative_error, resized
    from .writing import check_target

    check_target(out, _form(options), force=options["force"])
    exact = mixed([read_weighted(word) for word in files])
    ranks = _ranks(options)
    whole = resized(exact, ranks) if ranks.is_given else exact
    error = (
        f"; error of the change {relative_error(exact, whole):.2e}" if ranks.is_given else ", exactly the sum"
    )
    click.echo(f"{_ranks_of(whole)}{error}")
    click.echo(_written(whole, out, options))


def _merge(files: tuple[str, ...], base: str, out: Path, dtype: "Dtype | None", force: bool) -> None:
    from .merging import merge

    click.echo(merge(base, files, out, dtype=dtype, force=force))


def _extract(tuned: str, base: str, out: Path, conv_rank: int | None, **options: Any) -> None:
    from .extracting import extract
    from .writing import check_target

    check_target(out, _form(options), force=options["force"])
    found = extract(base, tuned, _ranks(options), conv_rank=conv_rank)
    click.echo(f"{_ranks_of(found.lora)}; largest error of a module's change {found.error:.2e}")
    if found.left_out:
        more = f"{len(found.left_out)} parameters, such as {found.left_out[0]}"
        click.echo(f"also changed, and in no LoRA: {more}")
    click.echo(_written(found.lora, out, options))


def _ranks(options: dict[str, Any]) -> "Ranks":
    from .combining import Ranks

    return Ranks(**{name: options.get(name) for name in _RANKS})


def _ranks_of(lora: "LoraFile") -> str:
    ranks = [module.rank for module in lora.modules]
    return f"{len(ranks)} modules, rank {min(ranks)}" + (f" to {max(ranks)}" if len(set(ranks)) > 1 else "")


def _form(options: dict[str, Any]) -> "Form | None":
    return FORMS[options["to"]] if options["to"] else None  # type: ignore[return-value]


def _written(lora: "LoraFile", out: Path, options: dict[str, Any]) -> Path:
    from .writing import write_lora

    return write_lora(lora, out, _form(options), dtype=options["dtype"], force=options["force"])


_CALLED: dict[str, Callable[..., None]] = {
    "inspect": _inspect,
    "convert": _convert,
    "resize": _resize,
    "mix": _mix,
    "merge": _merge,
    "extract": _extract,
}

lora = group("python -m trainer", _CALLED.__getitem__, click.Command)
