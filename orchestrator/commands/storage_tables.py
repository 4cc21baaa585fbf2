"""How ``gc``, ``du`` and ``checkpoints ls`` show what they found: as a table, and as JSON (schema 1)."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from storage.garbage.collecting import Collected
from storage.garbage.inventory import size_of
from storage.garbage.rules import Doomed, RunPlan
from storage.garbage.usage import Usage

from ..amounts import age_text, size_text
from ..reports.watch import console
from .cleaning import Survey


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What goes of one kind from one sweep."""

    sweep: str
    kind: str
    checkpoints: int = 0
    objects: int
    size_bytes: int
    when: str = "now"
    """``now``, or ``later``: by a later gc, when its grace period is over."""


def rows(plan: Survey) -> list[Row]:
    """Return what goes, by sweep and kind; sweeps in name order, runs of none last."""
    found: list[Row] = []
    for sweep in sorted(plan.runs, key=lambda name: (not name, name)):
        runs = plan.runs[sweep]
        found += _doomed(sweep, "superseded checkpoints", [d for r in runs for d in r.retire], "later")
        found += _doomed(sweep, "retired checkpoints", [d for r in runs for d in r.waiting], "later")
        found += _doomed(sweep, "retired checkpoints", [d for r in runs for d in r.reap], "now")
        orphans = [info for r in runs for info in r.orphans]
        found += _objects(sweep, "uploads of fenced attempts", len(orphans), size_of(orphans))
        found += _objects(sweep, "unfinished uploads", sum(r.unfinished for r in runs), 0)
    found += _objects("", "leftovers of probes", len(plan.probes), size_of(plan.probes))
    found += _objects("", "old terms of controllers", len(plan.terms), size_of(plan.terms))
    found += _objects("", "unfinished uploads of no run", len(plan.uploads), 0)
    gone = plan.contents
    found += _objects(
        "", "deleted content", sum(c.reap_objects for c in gone), sum(c.reap_bytes for c in gone)
    )
    retire = sum(len(c.retire) for c in gone)
    found += _objects("", "content that no sweep uses", retire, sum(c.retire_bytes for c in gone), "later")
    return found


def verdict(plan: Survey, found: list[Row], *, applied: bool) -> str:
    """Return the one sentence that says it all."""
    gone = [row for row in found if row.checkpoints]
    count, size = sum(row.checkpoints for row in gone), sum(row.size_bytes for row in gone)
    later = sum(row.checkpoints for row in gone if row.when == "later")
    rest = [row for row in found if not row.checkpoints]
    others = sum(row.objects for row in rest)
    parts = []
    if count:
        parts.append(f"{count} checkpoint{'s' * (count != 1)}, {size_text(size)}")
    if others:
        other_size = size_text(sum(row.size_bytes for row in rest))
        parts.append(f"{others} other object{'s' * (others != 1)}, {other_size}")
    does = "delete" if applied else "would delete"
    said = f"{does} {' and '.join(parts)}" if parts else "nothing to delete"
    if later:
        said += f" ({later} of the checkpoints by a later gc, after the grace period)"
    return f"{said}; {kept_text(r for runs in plan.runs.values() for r in runs)}"


def kept_text(runs: Iterable[RunPlan]) -> str:
    """Return what stays: "keep 18 (8 newest, 8 keep_last, 1 best, 1 pinned)"; each is counted once."""
    marks = [words[0] for run in runs for words in run.kept.values()]
    counts = ", ".join(f"{n} {word}" for word, n in Counter(marks).items())
    return f"keep {len(marks)} checkpoint{'s' * (len(marks) != 1)}" + (f" ({counts})" if counts else "")


def print_plan(found: list[Row]) -> None:
    shown = _table(("SWEEP", "KIND"), ("CHECKPOINTS", "OBJECTS", "SIZE", "WHEN"))
    for row in found:
        shown.add_row(
            Text(row.sweep or "–"),
            row.kind,
            str(row.checkpoints or ""),
            str(row.objects),
            size_text(row.size_bytes),
            row.when,
        )
    if found:
        console().print(shown)


def plan_json(plan: Survey, found: list[Row], url: str, done: Collected | None) -> dict[str, Any]:
    """Return the stable form of ``gc -o json``."""
    return {
        "schema": 1,
        "store": url,
        "applied": done is not None,
        "requests": plan.found.requests,
        "plan": [asdict(row) for row in found],
        "kept": {
            run.run: {f"{ref.step}.a{ref.attempt}": list(words) for ref, words in run.kept.items()}
            for runs in plan.runs.values()
            for run in runs
            if run.kept
        },
        "unreadable": plan.found.damaged,
        "done": asdict(done) if done else None,
    }


def print_usage(lines: list[Usage], *, now: str) -> None:
    shown = _table(("SWEEP", "RUN", "KIND"), ("OBJECTS", "SIZE"))
    for line in lines:
        size = size_text(line.size_bytes)
        kind = f"{line.kind} {line.digest[:12]}".strip()
        shown.add_row(Text(line.sweep or "–"), Text(line.run or "–"), kind, str(line.objects), size)
    console().print(shown)
    console(stderr=True).print(now, markup=False)


def usage_json(lines: list[Usage], url: str, requests: int, damaged: dict[str, str]) -> dict[str, Any]:
    """Return the stable form of ``du -o json``."""
    return {
        "schema": 1,
        "store": url,
        "requests": requests,
        "objects": sum(line.objects for line in lines),
        "size_bytes": sum(line.size_bytes for line in lines),
        "unreadable": damaged,
        "usage": [asdict(line) for line in lines],
    }


def _doomed(sweep: str, kind: str, doomed: list[Doomed], when: str) -> list[Row]:
    if not doomed:
        return []
    return [
        Row(
            sweep=sweep,
            kind=kind,
            checkpoints=len(doomed),
            objects=sum(len(d.sized) for d in doomed),
            size_bytes=sum(d.size_bytes for d in doomed),
            when=when,
        )
    ]


def _objects(sweep: str, kind: str, objects: int, size_bytes: int, when: str = "now") -> list[Row]:
    return [Row(sweep=sweep, kind=kind, objects=objects, size_bytes=size_bytes, when=when)] if objects else []


def _table(left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for name in left:
        shown.add_column(name, no_wrap=True)
    for name in right:
        shown.add_column(name, justify="right", no_wrap=True)
    return shown


def checkpoints_table(found: list[dict[str, Any]]) -> Table:
    """Return the table of ``checkpoints ls``."""
    shown = _table(("STEP",), ("ATTEMPT", "SIZE", "SENT", "AGE"))
    shown.add_column("METRICS")
    shown.add_column("MARKS", no_wrap=True)
    for row in found:
        shown.add_row(
            str(row["step"]),
            str(row["attempt"]),
            size_text(row["size_bytes"]),
            size_text(row["stored_bytes"]),
            age_text(row["age_s"]),
            Text(" ".join(f"{name}={value:.4g}" for name, value in row["metrics"].items())),
            ", ".join(row["marks"]),
        )
    return shown
