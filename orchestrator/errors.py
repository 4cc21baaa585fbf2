"""What can go wrong before and around a sweep, and the exit code that each means.

    OrchestrateError            1    something we did not foresee
    ├── InvalidFile             2    the sweep file, or an argument; carries every problem at once
    ├── PreflightFailed         3    the file is fine, the world is not (5 or 6 where only the store objects)
    ├── Unknown, Ambiguous      4    no such sweep or run, or several
    ├── AccessRefused           5    credentials or permissions
    ├── StoreUnreachable        6    the object store does not answer
    └── NoAnswer                7    the cluster, or the controller on it, is there and does not answer

A ``Problem`` is one line for a person: where, a code to search for, what is wrong, what to do.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from storage.errors import (
    AccessDenied,
    InvalidName,
    StorageError,
    Unavailable,
)

from .credentials import redacted

STORE_DENIED = "E2402"
STORE_UNREACHABLE = "E2403"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, or worth a warning."""

    code: str
    """``E`` and a number for an error, ``W`` and a number for a warning; documented in docs/grid.md."""
    message: str
    where: str | None = None
    """``file:line:column``, both counted from 1, or what else names the place."""
    hint: str | None = None
    """What to do about it."""

    @property
    def is_warning(self) -> bool:
        return self.code.startswith("W")

    def __str__(self) -> str:
        text = f"{self.code} {self.message}"
        return f"{text} — {self.hint}" if self.hint else text


class OrchestrateError(Exception):
    """Anything this package raises on purpose."""

    exit_code: int = 1


class ProblemsFound(OrchestrateError):
    """Everything that is wrong, all at once."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(format_problems(self.problems))


class InvalidFile(ProblemsFound):
    """The sweep file, or an argument laid over it, cannot be used."""

    exit_code = 2


class PreflightFailed(ProblemsFound):
    """The file can be used, but something that it names cannot."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        super().__init__(problems)
        codes = {problem.code for problem in self.problems if not problem.is_warning}
        self.exit_code = 5 if codes == {STORE_DENIED} else 6 if codes == {STORE_UNREACHABLE} else 3


class Unknown(OrchestrateError):
    """No sweep or run has this name, or several could be meant."""

    exit_code = 4


class Ambiguous(OrchestrateError):
    """Several sweeps or runs have a name that begins like this."""

    exit_code = 4

    def __init__(self, kind: str, name: str, candidates: Sequence[str]) -> None:
        more = f" and {len(candidates) - 8} more" if len(candidates) > 8 else ""
        super().__init__(
            f"{shown(name)} could be {kind} {', '.join(candidates[:8])}{more} — write more of it"
        )


class AccessRefused(OrchestrateError):
    """The store, or something else, refuses our credentials."""

    exit_code = 5


class StoreUnreachable(OrchestrateError):
    """The object store does not answer."""

    exit_code = 6


class NoAnswer(OrchestrateError):
    """The cluster, or the controller on it, is there and does not answer."""

    exit_code = 7


def translated(error: StorageError, store_url: str) -> OrchestrateError:
    """Return the error of this package that a storage error amounts to for a person at the command line."""
    match error:
        case AccessDenied():
            return AccessRefused(f"{store_url}: {error}")
        case Unavailable():
            return StoreUnreachable(f"{store_url}: {error}")
        case InvalidName():
            return InvalidFile([Problem("E2121", str(error))])
        case _:
            return OrchestrateError(f"{store_url}: {error}")


def format_problems(problems: Sequence[Problem], verdict: str = "") -> str:
    """Return the problems one a line, aligned, and a last line that counts them."""
    width = max((len(problem.where) + 1 for problem in problems if problem.where), default=0)
    lines = [f"{problem.where or '':<{width}}{problem}" for problem in problems]
    warnings = sum(problem.is_warning for problem in problems)
    counts = [_count(len(problems) - warnings, "error"), _count(warnings, "warning")]
    summary = ", ".join(count for count in counts if count)
    return "\n".join([*lines, f"{summary}. {verdict}".strip()])


def suggest(name: str, known: Iterable[str]) -> str | None:
    """Return "did you mean 'x'?" for the closest known name, or None if nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else None


def closest(name: str, known: Iterable[str]) -> str:
    """Return the end of a message, " — did you mean 'x'?"; empty if no known name is close."""
    hint = suggest(name, known)
    return f" — {hint}" if hint else ""


def shown(value: object) -> str:
    """Return a value as it may be shown on a terminal: on one line, escaped, short, without secrets."""
    text = redacted(repr(value))
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}" if number else ""
