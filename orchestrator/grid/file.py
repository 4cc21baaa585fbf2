"""A sweep file as text: YAML in, plain values out, and the line and column of every one of them.

Only mappings, lists, text, numbers, true/false and null come out: tags, merge keys and other YAML magic are
refused, and so is a text built to blow up (size, depth, aliases). Values are those of YAML 1.2: ``1e-4`` is
a number and ``no`` is text. What the values mean is decided in ``sweep``.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from ..credentials import looks_secret, names_secret
from ..errors import InvalidFile, Problem, shown
from .text import MAX_DEPTH, compose, place_of, refused, text_of

MAX_VALUES = 50_000
"""Values after aliases are expanded: a few nested aliases can stand for billions."""

ValuePath = tuple[str | int, ...]
"""Keys and list positions from the top of the file, e.g. ``("parameters", "rank", "values", 2)``."""

_TAG = "tag:yaml.org,2002:"
CREDENTIALS = ("env", "scoped")
"""What ``storage.credentials`` may say: where they come from, never what they are."""
_SECRET_HINT = "keep credentials in the environment or in the provider's own files"


@dataclass(frozen=True, slots=True)
class Document:
    """Plain values, and where each is written."""

    name: str
    """The file as the person named it: what messages begin with."""
    data: dict[str, Any]
    keys: Mapping[ValuePath, str]
    """Where the key of a value is written, as ``file:line:column``."""
    values: Mapping[ValuePath, str]
    texts: Mapping[ValuePath, str]
    """The text of each scalar, as written: ``1e-4`` where the value is 0.0001."""

    def where(self, path: ValuePath, *, key: bool = False) -> str:
        """Return where the value, or its key, is written; for one that is absent, what should contain it."""
        if key and path in self.keys:
            return self.keys[path]
        while path not in self.values:
            path = path[:-1]
        return self.values[path]


def read(path: Path) -> Document:
    """Read a sweep file.

    Raises:
        InvalidFile: With every problem that was found; a syntax error ends the search.
    """
    return parse(text_of(path), str(path))


def parse(text: str, name: str) -> Document:
    """Parse the text of a sweep file.

    Raises:
        InvalidFile
    """
    node = compose(text, name)
    if node is None:
        raise refused("E2109", "the file is empty", f"{name}:1:1", "begin with 'method: grid'")
    if not isinstance(node, MappingNode):
        kind = "a list" if isinstance(node, SequenceNode) else "a single value"
        message = f"the file is {kind}, expected 'key: value' lines"
        raise refused("E2109", message, place_of(name, node), "begin with 'method: grid'")
    reading = _Reading(name)
    data = reading.value(node, ())
    if reading.problems:
        raise InvalidFile(reading.problems)
    return Document(name, data, reading.keys, reading.values, reading.texts)


def parse_value(text: str, name: str) -> Any:
    """Parse one value as it could stand in a sweep file: ``1e-4`` is a number, ``[8, 16]`` a list.

    Raises:
        InvalidFile
    """
    node = compose(text, name)
    reading = _Reading(name, fixed_place=name)
    value = None if node is None else reading.value(node, ())
    if reading.problems:
        raise InvalidFile(reading.problems)
    return value


class _TooMuch(Exception):
    """The document is too deep or too large to read on."""


class _Reading:
    """One walk over the node graph: values, places and problems."""

    def __init__(self, name: str, fixed_place: str | None = None) -> None:
        self.name = name
        self.fixed_place = fixed_place
        self.problems: list[Problem] = []
        self.keys: dict[ValuePath, str] = {}
        self.values: dict[ValuePath, str] = {}
        self.texts: dict[ValuePath, str] = {}

    def value(self, node: Node, path: ValuePath) -> Any:
        try:
            return self._value(node, path)
        except _TooMuch:
            return None

    def _value(self, node: Node, path: ValuePath) -> Any:
        self.values[path] = self._place(node)
        if len(path) > MAX_DEPTH:
            self._refuse("E2108", f"values are nested deeper than {MAX_DEPTH} levels", node)
            raise _TooMuch
        if len(self.values) > MAX_VALUES:
            self._refuse(
                "E2108", f"there are more than {MAX_VALUES} values", node, "use fewer aliases (*name)"
            )
            raise _TooMuch
        if isinstance(node, ScalarNode):
            if node.style == ">":
                node.value = node.value.replace("\a", "")  # the library's marks of where lines were joined
            self.texts[path] = node.value
            if node.value == "" and node.style is None and path in self.keys:
                # YAML puts what is not there at the start of what comes next.
                self.values[path] = self.keys[path]
            return self._scalar(node)
        if str(node.tag) not in (f"{_TAG}map", f"{_TAG}seq"):
            self._refuse_tag(node)
        elif isinstance(node, MappingNode):
            return {key: self._value(child, (*path, key)) for key, child in self._members(node, path)}
        elif isinstance(node, SequenceNode):
            return [self._value(child, (*path, index)) for index, child in enumerate(node.value)]
        return None

    def _members(self, node: MappingNode, path: ValuePath) -> Iterator[tuple[str, Node]]:
        for key_node, child in node.value:
            key = key_node.value
            if not isinstance(key_node, ScalarNode) or str(key_node.tag) != f"{_TAG}str":
                hint = "YAML 1.2 has no merge keys: write them out" if key == "<<" else "put it into quotes"
                self._refuse("E2102", "a key must be text", key_node, hint)
            elif (*path, key) in self.keys:
                first = self.keys[(*path, key)]
                message = f"key {shown(key)} is given twice, first at {first}"
                self._refuse("E2106", message, key_node, "keep one of the two")
            else:
                self.keys[(*path, key)] = self._place(key_node)
                if (
                    names_secret(key)
                    and isinstance(child, ScalarNode)
                    and child.value not in ("", "null", "~")
                    and not ((*path, key) == ("storage", "credentials") and child.value in CREDENTIALS)
                    and not _is_taught(path, key)
                ):
                    self._refuse("E2120", f"{shown(key)} holds what looks like a secret", child, _SECRET_HINT)
                else:
                    yield key, child

    def _scalar(self, node: ScalarNode) -> Any:
        convert = _SCALARS.get(str(node.tag).removeprefix(_TAG))
        if convert is None:
            self._refuse_tag(node)
        elif looks_secret(node.value):
            self._refuse("E2120", "this holds what looks like a secret", node, _SECRET_HINT)
        else:
            try:
                return convert(node.value)
            except ValueError:
                self._refuse("E2102", f"{shown(node.value)} cannot be read", node, "quote it if it is text")
        return None

    def _refuse_tag(self, node: Node) -> None:
        tag = str(node.tag).replace(_TAG, "!!")
        self._refuse("E2107", f"tag {shown(tag)} is not allowed", node, "remove the tag")

    def _place(self, node: Node) -> str:
        return self.fixed_place or place_of(self.name, node)

    def _refuse(self, code: str, message: str, node: Node, hint: str | None = None) -> None:
        self.problems.append(Problem(code, message, self._place(node), hint))


def _integer(text: str) -> int:
    digits = text.replace("_", "")
    sign, digits = (-1, digits[1:]) if digits.startswith("-") else (1, digits.removeprefix("+"))
    return sign * (int(digits, 0) if digits[:2] in ("0x", "0o", "0b") else int(digits))


def _number(text: str) -> float:
    return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))


def _words(text: str) -> str:
    """Join the surrogate pairs that JSON's escapes leave; a lone half of one is an error."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16")


_SCALARS: Mapping[str, Callable[[str], Any]] = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() in ("true", "yes", "on", "y"),  # after a %YAML 1.1 line
    "int": _integer,
    "float": _number,
    "str": _words,
    # A plain date is text here: names and revisions may look like one.
    "timestamp": _words,
    "merge": _words,
    "value": _words,
}


def _is_taught(path: ValuePath, key: str) -> bool:
    """Whether a key is ``token`` in an item of ``base.tokens``: a word that a run teaches."""
    return key == "token" and len(path) > 1 and str(path[-2]).rpartition(".")[2] == "tokens"
