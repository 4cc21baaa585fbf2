"""From the cells of a sweep to a checked ``RunSpec`` for each."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from trainer.config import RunSpec

from ..errors import Problem, shown
from .errors import dotted, explain
from .expansion import Cell
from .file import Document, ValuePath
from .own_command import with_listed_words
from .pins import absolute_paths, identity
from .references import resolve
from .schema import ALIASES, BLOCKS, canonical_name, parameter_names

_NOTHING = Cell({}, {}, ())


def run_specs(
    document: Document, cells: Sequence[Cell], folder: Path, broken: Collection[str] = ()
) -> tuple[list[RunSpec], list[Problem]]:
    """Return the spec of each cell, and every problem once; with problems, some specs are missing.

    Args:
        folder: What relative paths in the file are relative to.
        broken: Blocks that were left out because they are no blocks: that they are missing is no news.
    """
    blocks, problems = _blocks(document)
    problems += _problems_under_parameters(document, blocks, broken, alone=not cells)
    specs: list[RunSpec] = []
    seen: dict[str, Cell] = {}
    for cell in cells:
        data = absolute_paths(resolve(_filled(blocks, cell), cell.parameters), folder)
        spec, errors = _checked(data)
        if spec is None:
            problems += _explained(_news(errors, broken), document, cell)
            continue
        first = seen.setdefault(json.dumps(identity(spec, {}), sort_keys=True), cell)
        if first is not cell:
            message = f"{_called(cell)} is the same run as one of {dotted(first.place)}"
            where = document.where(cell.place)
            problems.append(Problem("E2115", message, where, "every run must differ from the others"))
        specs.append(spec)
    return specs, list(dict.fromkeys(problems))


def _blocks(document: Document) -> tuple[dict[str, Any], list[Problem]]:
    """Return the blocks that a spec is made of, with other programs' names replaced by ours."""
    data = {block: document.data[block] for block in BLOCKS if isinstance(document.data.get(block), dict)}
    problems = []
    blocks: dict[str, Any] = {block: dict(body) for block, body in data.items()}
    for alias, (block, key) in ALIASES.items():
        body = blocks.get(block, {})
        if alias in body and key in body:
            message = f"{shown(alias)} is another name of {shown(key)}, which is given too"
            problems.append(
                Problem("E2106", message, document.where((block, alias), key=True), "keep one of the two")
            )
        if alias in body:
            body[key] = body.pop(alias)
    if "command" in data:
        return {**blocks, "command": with_listed_words(data["command"])}, problems
    return {"base": {}, "dataset": {}, **blocks}, problems


def _filled(blocks: dict[str, Any], cell: Cell) -> dict[str, Any]:
    """Return the blocks with one cell written over them."""
    names = parameter_names()
    data = {block: dict(body) for block, body in blocks.items()}
    for name, value in cell.parameters.items():
        block, key = names.get(name, ("", name))
        if "command" in blocks and block != "command":
            continue  # it is in the command's words already
        data.setdefault(block, {})[key] = value
    return data


def _problems_under_parameters(
    document: Document, blocks: dict[str, Any], broken: Collection[str], *, alone: bool
) -> list[Problem]:
    """Return what is wrong with values that every cell writes over, and would otherwise hide.

    With ``alone``, there are no cells to find the rest, so everything that does not depend on them counts.
    """
    given = {canonical_name(str(name)) for name in document.data.get("parameters") or {}}
    covered = {place for name, place in parameter_names().items() if canonical_name(name) in given}
    _, errors = _checked(resolve(blocks, {}))
    kept = []
    for details in _news(errors, broken):
        loc = details["loc"]
        is_covered = loc[:2] in covered
        if (
            "${" in str(details["input"])
            or details["type"] == "value_error"
            or (is_covered and details["type"] == "missing")
        ):
            continue
        if is_covered or alone:
            kept.append(details)
    return _explained(kept, document, _NOTHING)


def _news(errors: Sequence[ErrorDetails], broken: Collection[str]) -> list[ErrorDetails]:
    """The errors that do not merely follow from a block that is broken."""
    return [
        details
        for details in errors
        if not broken
        or (details["loc"] and details["loc"][0] not in broken and details["type"] != "value_error")
    ]


def _checked(data: dict[str, Any]) -> tuple[RunSpec | None, list[ErrorDetails]]:
    try:
        # By way of JSON: strict about types, but a list is fine where a tuple is meant.
        return RunSpec.model_validate_json(json.dumps(data), strict=True), []
    except ValidationError as error:
        return None, error.errors(include_url=False)


def _explained(errors: Sequence[ErrorDetails], document: Document, cell: Cell) -> list[Problem]:
    def locate(loc: ValuePath) -> ValuePath:
        """Find where a value of the spec is written: in the cell's parameters, or in a block of the file."""
        if len(loc) < 2:
            return loc
        block, key = loc[:2]
        name = canonical_name(f"{block}.{key}")
        if name in cell.written:
            return (*cell.written[name], *loc[2:])
        written = next(
            (
                alias
                for alias, target in ALIASES.items()
                if target == (block, key) and (block, alias) in document.values
            ),
            key,
        )
        return (block, written, *loc[2:])

    return explain(errors, RunSpec, document, locate)


def _called(cell: Cell) -> str:
    return dotted(cell.place) if len(cell.place) > 1 else f"the run with {_listed(cell.parameters)}"


def _listed(parameters: dict[str, Any]) -> str:
    return ", ".join(f"{name}={shown(value)}" for name, value in parameters.items())
