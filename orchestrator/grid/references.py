"""``${parameters.NAME}``: one value written as another.

Among parameters, one that is referred to holds a plain value: no chains, so no circles, and no texts that
double at each link.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import Problem, shown, suggest
from .file import Document, ValuePath
from .schema import BLOCKS, canonical_name

_REFERENCE = re.compile(r"\$\{([^}]*)\}")


def resolve(value: Any, parameters: dict[str, Any]) -> Any:
    """Return a value with each ``${parameters.NAME}`` replaced; alone, it takes the type of what it names.

    What names no parameter stays as it is: ``reference_problems`` has said so.
    """
    if isinstance(value, str):
        alone = _REFERENCE.fullmatch(value)
        if alone:
            return parameters.get(_target(alone[1]) or "", value)
        return _REFERENCE.sub(lambda found: str(parameters.get(_target(found[1]) or "", found[0])), value)
    if isinstance(value, list):
        return [resolve(item, parameters) for item in value]
    if isinstance(value, dict):
        return {key: resolve(item, parameters) for key, item in value.items()}
    return value


def reference_problems(document: Document, names: Sequence[str]) -> tuple[list[Problem], bool]:
    """Check every reference against the parameters that could be read.

    Returns:
        The problems, and whether all references can be resolved: one to a parameter that is itself wrong
        cannot, but needs no second message.
    """
    references = [(path, text, _target(text)) for path, text in _references(document.data)]
    sources = {_source(path) for path, _, target in references if target} - {None}
    written = {canonical_name(name) or name for name in document.data.get("parameters") or {}}
    problems, resolvable = [], True
    for path, text, target in references:
        where, quoted = document.where(path), shown("${" + text + "}")
        if target is None:
            # In a prompt, braces may mean something else.
            if _source(path):
                problems.append(
                    Problem("E2118", f"{quoted} refers to nothing", where, "write ${parameters.NAME}")
                )
        elif target in sources and _source(path):
            message = f"{quoted} names a parameter that is itself a reference"
            problems.append(Problem("E2118", message, where, "refer to one that has a plain value"))
        elif target not in names:
            resolvable = False
            if target not in written:
                hint = suggest(text.removeprefix("parameters."), names)
                problems.append(Problem("E2118", f"{quoted} names no parameter", where, hint))
    return problems, resolvable and not problems


def _source(path: ValuePath) -> str | None:
    """The parameter that the value at this place is for; None outside ``parameters`` and ``include``."""
    if path[0] == "parameters":
        return canonical_name(str(path[1])) or str(path[1])
    if path[0] == "include" and len(path) > 2:
        return canonical_name(str(path[2])) or str(path[2])
    return None


def _references(data: dict[str, Any]) -> Iterator[tuple[ValuePath, str]]:
    """Yield (path, what stands between the braces) of each reference where references are looked for."""
    stack: list[tuple[ValuePath, Any]] = [
        ((block,), data[block]) for block in ("include", "parameters", *BLOCKS) if block in data
    ]
    while stack:
        path, value = stack.pop()
        if isinstance(value, str):
            yield from ((path, found) for found in _REFERENCE.findall(value))
        elif isinstance(value, dict):
            stack.extend(((*path, key), item) for key, item in value.items())
        elif isinstance(value, list):
            stack.extend(((*path, index), item) for index, item in enumerate(value))


def _target(reference: str) -> str | None:
    """The parameter that a reference names, by its canonical name; None if it is not of that form."""
    if not reference.startswith("parameters."):
        return None
    named = reference.removeprefix("parameters.")
    return canonical_name(named) or named
