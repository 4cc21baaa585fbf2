"""A sweep file as bytes: read, decoded and parsed into YAML's own nodes, with foreign errors translated."""

import re
import warnings
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError, ReusedAnchorWarning, YAMLError
from ruamel.yaml.nodes import Node

from ..errors import InvalidFile, Problem

MAX_BYTES = 256 * 1024
MAX_DEPTH = 20

_TOML_LINE = re.compile(r"\s*(\[{1,2}[\w.\"-]+\]{1,2}|[\w-]+\s*=\s*\S.*)\s*(#.*)?")


def text_of(path: Path) -> str:
    """Return the text of a sweep file.

    Raises:
        InvalidFile: It cannot be read, is too large, is not UTF-8, or is TOML.
    """
    name = str(path)
    try:
        with path.open("rb") as file:
            body = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise refused("E2101", "there is no such file", name, "give the path of a sweep file") from None
    except IsADirectoryError:
        raise refused(
            "E2101", "this is a folder, expected a sweep file", name, f"try {path / 'grid.yaml'}"
        ) from None
    except OSError as error:
        raise refused("E2101", f"the file cannot be read: {error.strerror}", name) from None
    if len(body) > MAX_BYTES:
        raise refused("E2108", f"the file is larger than {MAX_BYTES // 1024} KB", name, "move data out of it")
    try:
        # utf-8-sig: some editors begin a file with a byte order mark.
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = body[: error.start]
        line, column = before.count(b"\n") + 1, error.start - (before.rfind(b"\n") + 1) + 1
        message = f"the file is not UTF-8: byte 0x{body[error.start]:02x}"
        raise refused("E2102", message, f"{name}:{line}:{column}", "save it as UTF-8") from None
    if path.suffix == ".toml" or _is_toml(text):
        hint = "write 'key: value' in place of 'key = value'"
        raise refused("E2109", "this is TOML, expected YAML", f"{name}:1:1", hint)
    return text


def _is_toml(text: str) -> bool:
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return bool(lines) and all(_TOML_LINE.fullmatch(line) for line in lines)


def compose(text: str, name: str) -> Node | None:
    """Parse YAML or JSON into nodes, which carry their places; None if there is nothing in it.

    Raises:
        InvalidFile: With the first syntax error.
    """
    if text.lstrip().startswith("{"):
        # YAML allows no tab before a token, JSON does. In JSON a line never begins inside a string.
        text = re.sub(r"^[ \t]+", lambda found: " " * len(found[0]), text, flags=re.MULTILINE)
    yaml = YAML(typ="rt")
    yaml.Composer = _Composer
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ReusedAnchorWarning)
            node: Node | None = yaml.compose(text)
    except MarkedYAMLError as error:
        raise InvalidFile([_syntax_problem(error, text, name)]) from None
    except YAMLError as error:
        raise refused("E2102", f"not YAML: {' '.join(str(error).split())}", f"{name}:1:1") from None
    except ValueError as error:  # e.g. an escape beyond Unicode
        raise refused("E2102", f"not YAML: {error}", f"{name}:1:1") from None
    return node


class _TooDeep(MarkedYAMLError):
    """Nested deeper than anyone means."""


class _Composer(Composer):
    """Stops at a depth: without it, a file of brackets takes minutes to parse and overflows the stack."""

    level = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.level > MAX_DEPTH:
            mark = self.parser.peek_event().start_mark
            raise _TooDeep(problem=f"values are nested deeper than {MAX_DEPTH} levels", problem_mark=mark)
        self.level += 1
        node = super().compose_node(parent, index)
        self.level -= 1
        return node


def _syntax_problem(error: MarkedYAMLError, text: str, name: str) -> Problem:
    mark = error.problem_mark or error.context_mark
    where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else f"{name}:1:1"
    message = " ".join(str(error.problem).split())
    if isinstance(error, _TooDeep):
        return Problem("E2108", message, where)
    if mark and mark.index is not None and text[mark.index : mark.index + 1] == "\t":
        return Problem("E2105", "a tab is used as indentation", where, "indent with spaces")
    if message == "but found another document":
        hint = "write one sweep a file, without '---' between"
        return Problem("E2109", "the file holds several documents", where, hint)
    if message == "mapping values are not allowed here":
        hint = "put text that holds ': ' into quotes"
        return Problem("E2102", "not YAML: a second ':' on the line", where, hint)
    context = f" {' '.join(error.context.split())}" if error.context else ""
    return Problem("E2102", f"not YAML: {message}{context}", where)


def refused(code: str, message: str, where: str, hint: str | None = None) -> InvalidFile:
    """An error with one problem."""
    return InvalidFile([Problem(code, message, where, hint)])


def place_of(name: str, node: Node) -> str:
    """Where a node is written, as ``file:line:column``, counted from 1."""
    return f"{name}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"
