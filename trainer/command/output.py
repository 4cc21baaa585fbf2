"""What a program prints: steps and losses while it works, numbers at its end, the exception it died of."""

import json
import math
import re
from dataclasses import dataclass
from typing import Any

_BAR = (
    r"(?:^|[\s|])(?P<step>\d+)/{steps}(?!\d)"
    r"(?:.*?\bloss=(?P<loss>[-+.\deE]+))?(?:.*?\blr=(?P<lr>[-+.\deE]+))?"
)
"""A progress bar of tqdm over all steps, with what its postfix says."""
_RANK = re.compile(r"^\[rank\d+\]:\s?")
_OBJECT = re.compile(r"\{[^{}]*\}$")
"""At the end of a line: a progress bar that was not closed may stand before it."""
_EXCEPTION = re.compile(r"^(?P<type>[A-Za-z_][\w.]*)(?:: ?(?P<message>.*))?$")
_OF_LAUNCHERS = frozenset({"CalledProcessError", "ChildFailedError", "SignalException"})
"""What a launcher says of the program that it had started, which has told more before."""
MAX_LINE_CHARACTERS = 4000


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A step that a program says it has made."""

    step: int
    loss: float | None = None
    lr: float | None = None


class Output:
    """Reads a program's lines, one after another.

    Args:
        expression: ``Command.progress``.
        steps: A line that tells of a later step than this one tells of something else.
    """

    def __init__(self, expression: str | None, steps: int) -> None:
        self._progress = re.compile(expression or _BAR.replace("{steps}", str(steps)))
        self._steps = steps
        self._in_traceback = False
        self.metrics: dict[str, float] = {}
        """The numbers of the last line that was a JSON object of numbers without a step."""
        self.exception: tuple[str, str] | None = None
        """Class and message of the last exception that ended a Python program."""
        self.last = ""
        """The last line that was not empty."""

    def line(self, text: str) -> Told | None:
        """Take in one line; returns the step that it tells of, if any."""
        text = _RANK.sub("", text[:MAX_LINE_CHARACTERS].rstrip())
        if not text:
            return None
        self.last = text
        self._look_for_exception(text)
        found = _OBJECT.search(text)
        if found and (numbers := _numbers(found[0])) is not None:
            if not isinstance(numbers.get("step"), int):
                self.metrics = {name: float(value) for name, value in numbers.items()}
                return None
            return self._told(numbers)
        found = self._progress.search(text)
        return self._told(found.groupdict()) if found else None

    def _told(self, said: dict[str, Any]) -> Told | None:
        step = _number(said.get("step"))
        if step is None or not 0 < step <= self._steps:
            return None
        return Told(step=int(step), loss=_number(said.get("loss")), lr=_number(said.get("lr")))

    def _look_for_exception(self, text: str) -> None:
        if text.startswith("Traceback (most recent call last)"):
            self._in_traceback = True
        elif self._in_traceback and not text[0].isspace():
            self._in_traceback = False
            found = _EXCEPTION.match(text)
            if found and (kind := found["type"].rpartition(".")[2]) not in _OF_LAUNCHERS:
                self.exception = kind, found["message"] or ""


def _numbers(text: str) -> dict[str, Any] | None:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not row:
        return None
    if any(
        isinstance(v, bool) or not isinstance(v, int | float) or not math.isfinite(v) for v in row.values()
    ):
        return None
    return row


def _number(said: Any) -> float | None:
    try:
        return None if said is None else float(said)
    except ValueError:
        return None


class Lines:
    """Cuts what a program prints into lines, of which most of those that a progress bar writes over each
    other are left out of the log.

    Args:
        every_s: One line of a progress bar in so many seconds is kept.
    """

    def __init__(self, every_s: float = 10.0) -> None:
        self._every_s = every_s
        self._rest = b""
        self._over = False
        """What is left begins where a line was that it is written over."""
        self._next_at = float("-inf")

    def cut(self, printed: bytes, now: float, *, ended: bool = False) -> tuple[list[str], bytes]:
        """Return the lines that are whole now, and what of them belongs into the log."""
        pieces = re.split(rb"(\r\n|\n|\r(?!\Z))", self._rest + printed)
        self._rest = pieces.pop()
        if ended or len(self._rest) > 1 << 16:
            pieces += [self._rest, b"\n"] if self._rest else []
            self._rest = b""
        lines, kept = [], bytearray()
        for body, end in zip(pieces[::2], pieces[1::2], strict=True):
            self._over = end == b"\r"
            lines.append(body.decode("utf-8", "replace"))
            if end != b"\r":
                kept += body + b"\n"
            elif body.strip() and now >= self._next_at:
                self._next_at = now + self._every_s
                kept += body + b"\n"
        return lines, bytes(kept)

    def standing(self) -> list[str]:
        """The line that a progress bar shows: it ends only where the next is written over it, which may be
        never. Ask when nothing more was printed for a while, or a part of it may be missing."""
        return [self._rest.decode("utf-8", "replace")] if self._over and self._rest else []
