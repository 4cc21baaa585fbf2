"""``command:`` in a sweep file: somebody else's training program, under the contract of ``trainer.rundir``.

What it is called with, how its checkpoints and its result are found among its files, and which local files it
needs. Everything that it writes lies under one folder, ``{out}``, in which it also starts.
"""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from .values import Frozen, Sha256

OUT, STEPS, EVERY, CHECKPOINT = "out", "steps", "every", "checkpoint"
BUILT_IN = (OUT, STEPS, EVERY, CHECKPOINT)
"""The folder of its output, the number of its last step, the steps between checkpoints, the restored one."""

_PLACEHOLDER = re.compile(r"(?<!\$)\{([A-Za-z_][A-Za-z0-9_]*)\}")
_INPUT_NAME = r"^[A-Za-z_][A-Za-z0-9_]*$"


class Input(Frozen):
    """A local file or folder that the command reads; ``data: photos`` is short for ``{path: photos}``."""

    path: Annotated[str, Field(min_length=1)]
    digest: Sha256 | None = None
    """sha256 of its content, pinned at submission; a node whose files differ fetches it from the store."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, given: Any) -> Any:
        return {"path": given} if isinstance(given, str) else given


class Command(Frozen):
    """A training program, and how to see from outside what it has done."""

    words: Annotated[tuple[str, ...], Field(min_length=1)]
    """The program and its arguments; in the file also one text, which is split as a shell does. ``{out}``,
    ``{steps}``, ``{every}`` and the names of ``inputs`` are placeholders."""
    resume: tuple[str, ...] = ()
    """Further arguments when a checkpoint was restored; ``{checkpoint}`` is its place."""
    steps: Annotated[int, Field(ge=1, lt=10**9)]
    """The step at which it is done, as its checkpoints are numbered."""
    checkpoints: str = "checkpoint-*"
    """Names its checkpoints, folders or files, below ``{out}``: the last number in what ``*`` stands for is
    the step."""
    complete: str | None = None
    """A pattern: without such a file in it, a checkpoint's folder is not complete."""
    quiet_s: Annotated[float, Field(gt=0)] = 5.0
    """So long nothing may have changed in a checkpoint before it counts as complete."""
    result: Annotated[tuple[str, ...], Field(min_length=1)]
    """Patterns below ``{out}``: the files that are there when it is done, and are the run's result."""
    progress: str | None = None
    """A regular expression with a group ``step``, and perhaps ``loss`` and ``lr``, for the lines that it
    prints; by default a progress bar of tqdm over all steps."""
    inputs: dict[Annotated[str, Field(pattern=_INPUT_NAME)], Input] = Field(
        default_factory=dict, max_length=32
    )
    """What it reads on this machine, by the name of the placeholder that becomes its place on the node."""

    @field_validator("checkpoints")
    @classmethod
    def _one_star(cls, pattern: str) -> str:
        _below(pattern)
        parent, name = str(PurePosixPath(pattern).parent), PurePosixPath(pattern).name
        if name.count("*") != 1 or any(sign in parent + name for sign in "?[]") or "*" in parent:
            raise ValueError(
                f"must have exactly one '*', in its last part, as in checkpoint-*, got {pattern!r}"
            )
        return pattern

    @field_validator("complete")
    @classmethod
    def _inside(cls, pattern: str | None) -> str | None:
        return pattern if pattern is None else _below(pattern)

    @field_validator("result")
    @classmethod
    def _all_below(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            _below(pattern)
        return patterns

    @field_validator("progress")
    @classmethod
    def _tells_steps(cls, expression: str | None) -> str | None:
        if expression is None:
            return None
        try:
            compiled = re.compile(expression)
        except re.error as error:
            raise ValueError(f"is not a regular expression: {error}") from error
        if "step" not in compiled.groupindex:
            raise ValueError(f"must have a group named step, as in (?P<step>[0-9]+)/500, got {expression!r}")
        return expression

    @field_validator("inputs")
    @classmethod
    def _not_ours(cls, inputs: dict[str, Input]) -> dict[str, Input]:
        if taken := sorted(inputs.keys() & set(BUILT_IN)):
            raise ValueError(f"must not use the name {taken[0]!r}: {{{taken[0]}}} means something else")
        return inputs

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        known = {OUT, STEPS, EVERY, *self.inputs}
        for key, words, names in (
            ("words", self.words, known),
            ("resume", self.resume, {*known, CHECKPOINT}),
        ):
            if any("\0" in word for word in words) or (key == "words" and not words[0]):
                raise ValueError(f"command.{key} must be a program and its arguments")
            if unknown := [name for name in placeholders(words) if name not in names]:
                listed = ", ".join(f"{{{name}}}" for name in sorted(names))
                raise ValueError(f"command.{key} has the placeholder {{{unknown[0]}}}; there are {listed}")
        return self

    @property
    def needs_steps_between(self) -> bool:
        """Whether ``checkpoint.every`` goes into its words: it must be a number of steps then."""
        return EVERY in placeholders((*self.words, *self.resume))


def placeholders(words: tuple[str, ...]) -> list[str]:
    """Return the names between braces, in order. ``${HOME}`` is none of them."""
    return [name for word in words for name in _PLACEHOLDER.findall(word)]


def filled(words: tuple[str, ...], values: Mapping[str, str]) -> list[str]:
    """Return the words with each placeholder replaced."""
    return [_PLACEHOLDER.sub(lambda found: values.get(found[1], found[0]), word) for word in words]


def _below(pattern: str) -> str:
    path = PurePosixPath(pattern)
    if not pattern or path.is_absolute() or ".." in path.parts or "\0" in pattern or not path.parts:
        raise ValueError(f"must be a pattern below the command's output folder, got {pattern!r}")
    return pattern
