"""What a ``command:`` block changes about a sweep file: its words, its parameters, its paths.

Where there is one, parameters may have any name: they go into the command's words by ``${parameters.NAME}``,
and one that goes nowhere is an error. Files among the words, also after ``--option=``, are relative to the
sweep file, and pinned by their content.
"""

import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.config import Command

from ..credentials import names_secret
from ..errors import Problem, shown
from .file import Document, ValuePath

FREE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
LISTS = ("words", "resume")


def with_listed_words(block: dict[str, Any]) -> dict[str, Any]:
    """Return the block with words that are one text split as a shell does, and with numbers as text."""
    return {**block, **{key: _listed(block[key]) for key in LISTS if key in block}}


def own_problems(document: Document, parameters: Mapping[str, ValuePath]) -> Iterator[Problem]:
    """Return what is wrong with parameters and words, as far as only a command is concerned.

    Args:
        parameters: Each by the name that it counts under, with where it is written.
    """
    block = document.data.get("command")
    if not isinstance(block, dict):
        return
    text = json.dumps(block)
    for name, path in parameters.items():
        written = str(path[1])
        is_used = any(f"${{parameters.{known}}}" in text for known in (written, name))
        if not name.startswith("command.") and not is_used:
            hint = f"write ${{parameters.{written}}} into command.words"
            message = f"nothing in command uses the parameter {shown(written)}"
            yield Problem("E2126", message, document.where(path, key=True), hint)
    for key in LISTS:
        words = _listed(block.get(key))
        if isinstance(words, str):
            message = f"command.{key} has a quote that is not closed"
            yield Problem("E2111", message, document.where(("command", key)))
        for word in _secrets(words) if isinstance(words, list) else ():
            where = document.where(("command", key))
            hint = "the program finds it in the environment, or in a file on its node"
            yield Problem("E2120", f"{shown(word)} in command.{key} gives a secret away", where, hint)


def absolute_command(block: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the block with its paths made absolute: of inputs, and of words that are files in ``folder``."""
    data = dict(block)
    if isinstance(inputs := block.get("inputs"), dict):
        data["inputs"] = {name: _absolute_input(given, folder) for name, given in inputs.items()}
    for key in LISTS:
        if isinstance(words := block.get(key), list):
            data[key] = [_absolute_word(word, folder) if isinstance(word, str) else word for word in words]
    return data


def files_among(command: Command, folder: Path) -> list[str]:
    """Return the absolute paths below ``folder`` among a command's words."""
    paths = (_path_in(word)[1] for word in (*command.words, *command.resume))
    return [path for path in paths if Path(path).is_absolute() and Path(path).is_relative_to(folder)]


def by_content(words: list[str], pins: Mapping[str, str]) -> list[str]:
    """Return the words with files named by their content."""
    named = []
    for word in words:
        option, path = _path_in(word)
        named.append(option + pins.get(path, path))
    return named


def _listed(words: Any) -> Any:
    if isinstance(words, str):
        try:
            words = shlex.split(words)
        except ValueError:  # a quote that is not closed: shown as no list
            return words
    if not isinstance(words, list):
        return words
    return [str(w) if isinstance(w, int | float) and not isinstance(w, bool) else w for w in words]


def _secrets(words: list[Any]) -> Iterator[str]:
    """Options such as ``--hub_token=…`` with a value in plain sight."""
    texts = [word if isinstance(word, str) else "" for word in words]
    for word, following in zip(texts, [*texts[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        name = option.lstrip("-").replace("-", "_")
        given = value if equals else following
        is_option = word.startswith("-") or (bool(equals) and name.isidentifier())
        if is_option and names_secret(name) and given and given[0] not in "-${":
            yield option


def _path_in(word: str) -> tuple[str, str]:
    """Split ``--option=path`` into what stands before the path, and the path."""
    option, equals, path = word.partition("=")
    return (option + equals, path) if equals and option.startswith("-") else ("", word)


def _absolute_word(word: str, folder: Path) -> str:
    option, path = _path_in(word)
    return option + _absolute(path, folder) if path and _is_file(folder / path) else word


def _absolute_input(given: Any, folder: Path) -> Any:
    if isinstance(given, str) and given:
        return _absolute(given, folder)
    if isinstance(given, dict) and isinstance(given.get("path"), str) and given["path"]:
        return {**given, "path": _absolute(given["path"], folder)}
    return given


def _absolute(path: str, folder: Path) -> str:
    return os.path.normpath(folder / os.path.expanduser(path))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
