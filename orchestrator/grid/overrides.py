"""``--set KEY=VALUE``: single values laid over a sweep file."""

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.config import Base

from ..errors import InvalidFile, Problem, shown
from .file import Document, ValuePath, parse_value
from .schema import ALIASES


def overlaid(document: Document, overrides: Sequence[str]) -> Document:
    """Return the document with each ``KEY=VALUE`` written over it, in order.

    A key is a path in the file, ``checkpoint.every``; a bare key of ``base`` stands for ``base.<key>``.
    Values are read as YAML. What is wrong with a value is found, and shown at its option, by later checks.

    Raises:
        InvalidFile: A text is not ``KEY=VALUE``, or its key leads through something that is not a block.
    """
    for text in overrides:
        document = _overlaid(document, text)
    return document


def _overlaid(document: Document, text: str) -> Document:
    key, equals, value = text.partition("=")
    path: ValuePath = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise InvalidFile([Problem("E2123", f"{shown(text)} is not KEY=VALUE", "--set", "e.g. --set rank=8")])
    if len(path) == 1 and path[0] in Base.model_fields:
        path = ("base", *path)
    elif len(path) == 1 and path[0] in ALIASES:
        path = (ALIASES[str(path[0])][0], *path)
    place = f"--set {'.'.join(map(str, path))}"
    if not isinstance(document.data.get("parameters"), Mapping):
        parameters: Mapping[str, Any] = {}
    else:
        parameters = document.data["parameters"]
    if path[0] == "base" and path[-1] in parameters:
        hint = f"--set parameters.{path[-1]}='{{value: …}}' gives it one value"
        raise InvalidFile([Problem("E2123", f"'{path[-1]}' is a parameter of the sweep", place, hint)])
    # A name is text even where YAML would read a number: --set name=2024
    read = value if path == ("name",) else parse_value(value, place)
    data = _with(document.data, path, read, place)
    keys, values, texts = (
        _outside(places, path) for places in (document.keys, document.values, document.texts)
    )
    parents = [path[:length] for length in range(1, len(path) + 1)]
    marks = {parent: place for parent in parents if parent not in values}
    return Document(document.name, data, {**keys, **marks}, {**values, **marks}, {**texts, path: value})


def _with(data: Mapping[str, Any], path: ValuePath, value: Any, place: str) -> dict[str, Any]:
    key = str(path[0])
    if len(path) == 1:
        return {**data, key: value}
    inner = data.get(key) or {}
    if not isinstance(inner, Mapping):
        raise InvalidFile([Problem("E2123", f"{shown(key)} is not a block of keys", place)])
    return {**data, key: _with(inner, path[1:], value, place)}


def _outside(places: Mapping[ValuePath, str], path: ValuePath) -> dict[ValuePath, str]:
    return {other: text for other, text in places.items() if other[: len(path)] != path}
