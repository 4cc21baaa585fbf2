"""A sweep file with nothing wrong, ways to put a mistake into it, and what must be said of it."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator.errors import InvalidFile
from orchestrator.grid.sweep import validate

GOOD = """\
method: grid
parameters:
  learning_rate: {values: [5e-5, 1e-4]}
base: {model: owner/model}
dataset: {path: data}
"""


@dataclass(frozen=True)
class Case:
    """One mistake, by its number in the list of faults."""

    number: str
    text: str | bytes
    place: str
    """Line and column."""
    code: str
    message: str
    """What the printed line contains after the code."""


def added(line: str) -> str:
    """The good file with something after its last line: on line 6."""
    return f"{GOOD}{line}\n"


def changed(old: str, new: str) -> str:
    """The good file with one text replaced."""
    assert old in GOOD
    return GOOD.replace(old, new)


def searched(parameter: str) -> str:
    """The good file with another line of parameters, on line 4."""
    return changed("base:", f"  {parameter}\nbase:")


def valued(values: str) -> str:
    """The good file with other values of the learning rate, on line 3 from column 18."""
    return changed("{values: [5e-5, 1e-4]}", values)


def based(entry: str) -> str:
    """The good file with one more key of base, on line 4 from column 28."""
    return changed("owner/model}", f"owner/model, {entry}}}")


def by_number(case: Case) -> str:
    """The name of a test of this mistake."""
    return f"{case.number}-{case.code}-{case.place}"


def assert_named_at_its_place(case: Case, folder: Path) -> None:
    file = folder / "grid.yaml"
    file.write_bytes(case.text if isinstance(case.text, bytes) else case.text.encode())

    with pytest.raises(InvalidFile) as caught:
        validate(file)

    assert caught.value.exit_code == 2
    text = str(caught.value)
    place = f"{file}:{case.place}" if case.place else str(file)
    lines = [line for line in text.splitlines() if line.startswith(f"{place} {case.code} ")]
    assert len(lines) == 1, text
    assert case.message.replace("FILE", str(file)) in lines[0]
    assert text.splitlines()[-1] == "1 error."
    assert "hunter2" not in text
    assert "AKIA" not in text
