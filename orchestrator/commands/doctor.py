"""``orchestrate doctor``: what ``storage.doctor`` finds, a line each, and one exit code for all of it."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace

import click
from rich.text import Text

from storage.doctor.examination import Cause, Check, examine
from storage.redaction import printable, redacted
from storage.url import open_store

from ..reports.watch import console

SCHEMA = 1
EXIT_WRONG, EXIT_DENIED, EXIT_UNREACHABLE = 3, 5, 6


def run_doctor(url: str, *, checkpoint_bytes: int, as_json: bool) -> int:
    """Examine a store and print what was found: as it is found, or as one JSON object; return the exit code.

    Raises:
        InvalidName: The url is none of a store.
    """
    shown_url = open_store(url).url
    talk = console(stderr=True)
    found: list[Check] = []
    with talk.status(f"examining {shown_url}") as progress:
        examined = examine(
            url, announce=lambda name: progress.update(f"{name} …"), checkpoint_bytes=checkpoint_bytes
        )
        for check in _cleaned(examined):
            found.append(check)
            if not as_json:
                progress.stop()  # two consoles do not know of each other's lines
                for line in lines(check):
                    console().print(line)
                progress.start()
    code = exit_code(found)
    if as_json:
        click.echo(json.dumps(as_object(shown_url, found)))
    else:
        click.echo(verdict(found), err=True)
    return code


def lines(check: Check) -> list[Text]:
    """Return what a person reads of a check."""
    word, style = _word(check)
    shown = [Text.assemble((f"{word:<8}", style), f"{check.name:<17}", check.said)]
    if check.todo:
        shown.append(Text(f"{'':<8}{'':<17}→ {check.todo}"))
    return shown


def as_object(url: str, found: Sequence[Check]) -> dict[str, object]:
    """Return what a program reads of all of them."""
    return {
        "schema": SCHEMA,
        "store": url,
        "ok": exit_code(found) == 0,
        "checks": [asdict(check) for check in found],
    }


def exit_code(found: Iterable[Check]) -> int:
    """Return 0 if nothing is wrong; 6 or 5 if the store cannot be reached, or refuses, and that is all."""
    causes = {check.cause for check in found if check.ok is False}
    if not causes:
        return 0
    if causes == {Cause.UNREACHABLE}:
        return EXIT_UNREACHABLE
    return EXIT_DENIED if causes == {Cause.DENIED} else EXIT_WRONG


def verdict(found: Sequence[Check]) -> str:
    """Return the last line."""
    wrong = sum(check.ok is False for check in found)
    warnings = sum(check.ok is True and bool(check.todo) for check in found)
    if wrong:
        return f"{wrong} of {len(found)} checks failed."
    return f"The store will do{f', with {warnings} warning(s)' if warnings else ''}."


def _word(check: Check) -> tuple[str, str]:
    match check.ok:
        case None:
            return "skipped", "dim"
        case False:
            return "WRONG", "red"
        case _:
            return ("warning", "yellow") if check.todo else ("ok", "green")


def _cleaned(found: Iterable[Check]) -> Iterator[Check]:
    """A server's answers may carry anything."""
    for check in found:
        yield replace(check, said=redacted(printable(check.said)))
