"""From ``parameters``, ``include`` and ``exclude`` to the cells of a sweep, in a fixed order.

The order is the file's: the last parameter changes fastest, then what ``include`` adds, minus what
``exclude`` names. Works on what was read, and collects problems instead of stopping at the first.
"""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import Problem, shown, suggest
from .errors import as_written, dotted, unknown_key
from .file import Document, ValuePath
from .own_command import FREE_NAME, own_problems
from .references import reference_problems, resolve
from .schema import Grid, canonical_name, parameter_names

MAX_RUNS = 10_000

_SEARCH_WORDS = ("distribution", "min", "max", "mu", "sigma", "q", "probabilities")


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination of parameters."""

    parameters: dict[str, Any]
    """By canonical name, references resolved."""
    written: dict[str, ValuePath]
    """Where each of them is in the file."""
    place: ValuePath
    """Where the cell as a whole comes from: ``parameters``, or one entry of ``include``."""


@dataclass(frozen=True, slots=True)
class _Axis:
    name: str
    values: list[Any]
    paths: list[ValuePath]


@dataclass(frozen=True, slots=True)
class _Entry:
    """One entry of ``include`` or ``exclude``, by canonical names."""

    place: ValuePath
    values: dict[str, Any]
    written: dict[str, ValuePath]


@dataclass(slots=True)
class Expansion:
    """The cells, how many a ``run_cap`` left out, and what is wrong."""

    cells: list[Cell] = field(default_factory=list)
    left_out: int = 0
    problems: list[Problem] = field(default_factory=list)

    def refuse(self, code: str, message: str, where: str, hint: str | None = None) -> None:
        self.problems.append(Problem(code, message, where, hint))


def expand(document: Document, grid: Grid) -> Expansion:
    """Return the cells of a sweep. With problems, the cells are only those that could still be made."""
    result = Expansion()
    axes = _axes(document, grid, result)
    included = _entries("include", document, axes, result)
    excluded = _entries("exclude", document, axes, result)
    problems, resolvable = reference_problems(document, [axis.name for axis in axes])
    result.problems.extend(problems)
    result.problems.extend(own_problems(document, {axis.name: axis.paths[0][:2] for axis in axes}))
    if not resolvable:
        return result
    product = math.prod(len(axis.values) for axis in axes)
    if product + len(included) > MAX_RUNS:
        sizes = " x ".join(str(len(axis.values)) for axis in axes)
        result.refuse(
            "E2116",
            f"the parameters make {product + len(included)} runs ({sizes}), more than {MAX_RUNS}",
            document.where(("parameters",), key=True),
            "list fewer values",
        )
        axes = [_Axis(axis.name, axis.values[:1], axis.paths[:1]) for axis in axes]
    cells = [*_product(axes), *_added(document, axes, included, result)]
    cells = _without(cells, excluded, document, result)
    result.cells = cells[: grid.run_cap]
    result.left_out = len(cells) - len(result.cells)
    return result


def comparable(value: Any) -> str:
    """Return a text that is equal for equal values: 32 and 32.0, but not 1 and true."""
    return json.dumps(_plain(value), sort_keys=True)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _axes(document: Document, grid: Grid, result: Expansion) -> list[_Axis]:
    if not grid.parameters:
        result.refuse(
            "E2104",
            "parameters is empty" if "parameters" in document.data else "parameters is missing",
            document.where(("parameters",), key=True),
            "name at least one, e.g. learning_rate: {values: [5e-5, 1e-4]}",
        )
    axes: dict[str, _Axis] = {}
    for written, body in grid.parameters.items():
        path: ValuePath = ("parameters", written)
        name = canonical_name(written)
        if name is None and "command" in document.data and FREE_NAME.fullmatch(written):
            name = written  # it goes into the command's words
        if name is None:
            result.problems.append(
                unknown_key(written, "parameters", parameter_names(), document.where(path, key=True))
            )
        elif name in axes:
            first = dotted(axes[name].paths[0][:2])
            message = f"parameter {shown(written)} is the same as {first}"
            result.refuse("E2106", message, document.where(path, key=True), "keep one of the two")
        else:
            axis = _axis(name, body, path, document, result)
            if axis:
                axes[name] = axis
    return list(axes.values())


def _axis(name: str, body: Any, path: ValuePath, document: Document, result: Expansion) -> _Axis | None:
    where = document.where(path)
    if not isinstance(body, dict):
        key = "values" if isinstance(body, list) else "value"
        hint = f"write {path[-1]}: {{{key}: {as_written(document, path, body)}}}"
        result.refuse("E2114", f"{dotted(path)} must be {{value: …}} or {{values: […]}}", where, hint)
        return None
    if not _only_value_or_values(body, path, document, result):
        return None
    if "value" in body:
        return _Axis(name, [body["value"]], [(*path, "value")])
    values, here = body["values"], (*path, "values")
    if not isinstance(values, list):
        text = as_written(document, here, values)
        message = f"'values: {text}' must be a list"
        result.refuse("E2110", message, document.where(here), f"write values: [{text}]")
        return None
    if not values:
        result.refuse("E2114", f"{dotted(here)} is empty", document.where(here), "list at least one value")
        return None
    seen: dict[str, int] = {}
    for index, value in enumerate(values):
        first = seen.setdefault(comparable(value), index)
        if first != index:
            message = f"{dotted(here)} lists {as_written(document, (*here, index), value)} twice"
            result.refuse(
                "E2115", message, document.where((*here, index)), "every run must differ from the others"
            )
    kept = sorted(seen.values())
    return _Axis(name, [values[index] for index in kept], [(*here, index) for index in kept])


def _only_value_or_values(
    body: dict[str, Any], path: ValuePath, document: Document, result: Expansion
) -> bool:
    found = len(result.problems)
    for key in body.keys() - {"value", "values", *_SEARCH_WORDS}:
        here = document.where((*path, key), key=True)
        result.problems.append(unknown_key(key, dotted(path), ("value", "values"), here))
    searching = [key for key in body if key in _SEARCH_WORDS]
    if searching:
        message = f"{dotted(path)}: '{searching[0]}' is for random and bayes search, but method is grid"
        here = document.where((*path, searching[0]), key=True)
        result.refuse("E2114", message, here, "list the values: {values: […]}")
    given = [key for key in ("value", "values") if key in body]
    if len(given) == 2:
        message = f"{dotted(path)} has both 'value' and 'values'"
        result.refuse("E2114", message, document.where((*path, "values"), key=True), "keep one of the two")
    if not given and len(result.problems) == found:
        message = f"{dotted(path)} has neither 'value' nor 'values'"
        result.refuse("E2114", message, document.where(path), "write {values: […]}")
    return len(result.problems) == found


def _entries(block: str, document: Document, axes: Sequence[_Axis], result: Expansion) -> list[_Entry]:
    known = [axis.name for axis in axes]
    entries = []
    for index, body in enumerate(document.data.get(block) or []):
        place: ValuePath = (block, index)
        values: dict[str, Any] = {}
        written: dict[str, ValuePath] = {}
        for key, value in body.items():
            name = canonical_name(key) or key
            if name in known:
                values[name], written[name] = value, (*place, key)
                continue
            # What is wrong with a parameter itself was said where it is written.
            if key not in (document.data.get("parameters") or {}):
                message = f"{dotted(place)} names {shown(key)}, which is not among the parameters"
                hint = suggest(key, known) or f"the parameters are {', '.join(known)}"
                result.refuse("E2117", message, document.where((*place, key), key=True), hint)
        if not body:
            result.refuse("E2117", f"{dotted(place)} is empty", document.where(place), "remove it")
        entries.append(_Entry(place, values, written))
    return entries


def _product(axes: Sequence[_Axis]) -> Iterator[Cell]:
    if not axes:
        return
    for indices in itertools.product(*(range(len(axis.values)) for axis in axes)):
        chosen = list(zip(axes, indices, strict=True))
        parameters = {axis.name: axis.values[index] for axis, index in chosen}
        written = {axis.name: axis.paths[index] for axis, index in chosen}
        yield Cell(resolve(parameters, parameters), written, ("parameters",))


def _added(
    document: Document,
    axes: Sequence[_Axis],
    included: Sequence[_Entry],
    result: Expansion,
) -> Iterator[Cell]:
    for entry in included:
        missing = [axis.name for axis in axes if axis.name not in entry.values and len(axis.values) > 1]
        if missing:
            message = f"{dotted(entry.place)} does not say {', '.join(missing)}"
            hint = "give a value to each parameter that has several"
            result.refuse("E2117", message, document.where(entry.place), hint)
            continue
        parameters = {axis.name: entry.values.get(axis.name, axis.values[0]) for axis in axes}
        paths = {axis.name: entry.written.get(axis.name, axis.paths[0]) for axis in axes}
        yield Cell(resolve(parameters, parameters), paths, entry.place)


def _without(
    cells: list[Cell],
    excluded: Sequence[_Entry],
    document: Document,
    result: Expansion,
) -> list[Cell]:
    kept = cells
    for entry in excluded:
        if not entry.values:
            continue
        wanted = {name: comparable(value) for name, value in entry.values.items()}
        hit = [
            c for c in cells if all(comparable(c.parameters[name]) == text for name, text in wanted.items())
        ]
        if not hit and not result.problems:
            message = f"{dotted(entry.place)} matches no run"
            result.refuse("E2117", message, document.where(entry.place), "remove it, or correct its values")
        kept = [cell for cell in kept if not any(cell is other for other in hit)]
    if cells and not kept:
        where = document.where(("exclude",), key=True)
        result.refuse("E2117", "exclude removes every run", where, "remove an entry")
    return kept
