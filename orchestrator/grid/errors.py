"""What pydantic found wrong, in words for the person who wrote the file, at the line where they wrote it."""

import re
from collections.abc import Callable, Iterable
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from ..errors import Problem, shown, suggest
from .file import Document, ValuePath
from .schema import ALIASES, NOT_YET

UNKNOWN_KEY, MISSING_KEY, NOT_A_LIST, BAD_VALUE, NOT_YET_CODE = "E2103", "E2104", "E2110", "E2111", "E2124"

_INSTEAD = {
    "track": "remove it; orchestrate track NAME --to tensorboard, or wandb, does it at any time",
    "export": "remove it; orchestrate export NAME --best does it at any time",
    "program": "remove it; a training program of your own is command: see docs/own-script.md",
}
"""What to do instead of a key that is not supported."""

Locate = Callable[[ValuePath], ValuePath]
"""From where a value is in the model to where it is written in the file."""

_BOUNDS = {
    "greater_than_equal": ("must be at least {}", "ge"),
    "greater_than": ("must be greater than {}", "gt"),
    "less_than_equal": ("must be at most {}", "le"),
    "less_than": ("must be less than {}", "lt"),
    "multiple_of": ("must be a multiple of {}", "multiple_of"),
    "string_pattern_mismatch": ("must match {}", "pattern"),
}
_KINDS = {
    "int": "must be a whole number",
    "float": "must be a number",
    "finite_number": "must be a finite number",
    "bool": "must be true or false",
    "string": "must be text",
    "dict": "must be a block of 'key: value' lines",
    "model": "must be a block of 'key: value' lines",
    "none": "must be empty",
}
_NAMED = re.compile(r"[a-z_]+(?:\.[a-z_0-9]+)*")


def explain(
    errors: Iterable[ErrorDetails], model: type[BaseModel], document: Document, locate: Locate
) -> list[Problem]:
    """Return one problem for each thing that is wrong with what should have become a ``model``."""
    problems: dict[tuple[str | None, str], Problem] = {}
    for details in errors:
        problem = _problem(details, model, document, locate)
        if problem.code == NOT_A_LIST:  # a name or a list: what is no such name was meant as a list of one
            problems.pop((problem.where, BAD_VALUE), None)
        # The branches of a union each report the same value: the first says enough.
        problems.setdefault((problem.where, problem.code), problem)
    return list(problems.values())


def unknown_key(key: str, block: str, known: Iterable[str], where: str) -> Problem:
    """Return the problem of a key that does not exist. ``block`` is "" at the top of the file."""
    if not block and key in NOT_YET:
        instead = _INSTEAD.get(key, "remove it")
        return Problem(NOT_YET_CODE, f"{shown(key)} is not supported by this version", where, instead)
    hint = suggest(key, known)
    if hint is None and block == "storage":
        hint = "everything about the store is in its url: s3://bucket/prefix?endpoint=https://…"
    place = f" in {block}" if block else ""
    return Problem(UNKNOWN_KEY, f"unknown key {shown(key)}{place}", where, hint)


def dotted(path: ValuePath) -> str:
    """Return a path as people write it: ``parameters.rank.values[2]``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _problem(details: ErrorDetails, model: type[BaseModel], document: Document, locate: Locate) -> Problem:
    loc = _without_branches(details["loc"], document, locate)
    path, kind, context = locate(loc), details["type"], details.get("ctx", {})
    name, given = dotted(path), details["input"]
    if kind == "extra_forbidden":
        key = str(loc[-1])
        return unknown_key(key, dotted(path[:-1]), _known(model, loc[:-1]), document.where(path, key=True))
    if kind == "missing":
        return Problem(MISSING_KEY, f"{dotted(loc)} is missing", document.where(path))
    if kind == "value_error":
        return _own_words(str(context["error"]), name, path, document)
    where = document.where(path)
    if kind in ("list_type", "tuple_type"):
        text = as_written(document, path, given)
        return Problem(
            NOT_A_LIST, f"'{path[-1]}: {text}' must be a list", where, f"write {path[-1]}: [{text}]"
        )
    if kind == "too_short":
        return Problem(BAD_VALUE, f"{name} must not be empty", where)
    if kind == "literal_error":
        return _not_a_choice(name, given, str(context["expected"]), where)
    if kind in _BOUNDS:
        text, key = _BOUNDS[kind]
        bound = f"{context[key]:g}" if isinstance(context[key], float) else context[key]
        message = f"{name} {text.format(bound)}, got {_given(document, path, given)}"
        return Problem(BAD_VALUE, message, where)
    expected = next((text for prefix, text in _KINDS.items() if kind.startswith(prefix)), details["msg"])
    quoted = kind.startswith("string") and isinstance(given, int | float)
    hint = "put it into quotes" if quoted else None
    return Problem(BAD_VALUE, f"{name} {expected}, got {_given(document, path, given)}", where, hint)


def _given(document: Document, path: ValuePath, given: Any) -> str:
    """A value in a message: text in quotes, numbers as they were written."""
    return shown(given) if isinstance(given, str) else as_written(document, path, given)


def _own_words(message: str, name: str, path: ValuePath, document: Document) -> Problem:
    """A rule of our own: about one value, or about several that it names."""
    if path and not _is_block(path, document):
        return Problem(BAD_VALUE, f"{name} {message}", document.where(path))
    for words in _NAMED.findall(message):
        named: ValuePath = tuple(words.split("."))
        if named in document.keys:
            return Problem(BAD_VALUE, message, document.where(named))
    return Problem(BAD_VALUE, message, document.where(path))


def _is_block(path: ValuePath, document: Document) -> bool:
    return any(other[: len(path)] == path and len(other) > len(path) for other in document.values)


def _not_a_choice(name: str, given: Any, expected: str, where: str) -> Problem:
    choices = re.findall(r"'([^']*)'", expected)
    hint = suggest(given, choices) if isinstance(given, str) else None
    return Problem(BAD_VALUE, f"{name} must be {expected}, got {shown(given)}", where, hint)


def _without_branches(loc: tuple[int | str, ...], document: Document, locate: Locate) -> ValuePath:
    """Drop what pydantic appends for the branch of a union ("str", "constrained-int")."""
    while len(loc) > 1 and locate(loc) not in document.values and locate(loc[:-1]) in document.values:
        parent = document.values.get(locate(loc[:-1]))
        if parent is None or _is_block(locate(loc[:-1]), document) or not _is_branch(loc[-1]):
            break
        loc = loc[:-1]
    return loc


def _is_branch(part: int | str) -> bool:
    return part in _BRANCHES or str(part).startswith(("tuple[", "literal["))


_BRANCHES = frozenset(
    {"str", "int", "float", "bool", "constrained-int", "constrained-float", "constrained-str"}
)


def _known(model: type[BaseModel], loc: ValuePath) -> list[str]:
    """The keys that the model takes at this place."""
    for part in loc:
        field = model.model_fields.get(str(part))
        inner = _model_in(field.annotation) if field else None
        if inner is None:
            return []
        model = inner
    aliases = [alias for alias, (block, _) in ALIASES.items() if loc == (block,)]
    return [*model.model_fields, *aliases]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def as_written(document: Document, path: ValuePath, value: Any) -> str:
    """Return a value as it stands in the file, or as one would write it there, on one line."""
    if path in document.texts:
        return shown(document.texts[path]).strip("'") or "nothing"
    if isinstance(value, list):
        return f"[{', '.join(as_written(document, (*path, i), item) for i, item in enumerate(value[:8]))}]"
    return "{…}" if isinstance(value, dict) else shown(value).strip("'")
