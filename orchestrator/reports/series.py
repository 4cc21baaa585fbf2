"""What a run measured, as one line through all its attempts. Pure.

An attempt that went on from step ``s`` takes the place of whatever was measured beyond ``s`` before: those
steps led nowhere. What a dead node measured and never sent is missing.
"""

from collections.abc import Iterable, Mapping
from typing import Any

Row = tuple[int, dict[str, float]]
"""A step, and what was measured there."""


def series(attempts: Iterable[Iterable[Mapping[str, Any]]]) -> list[Row]:
    """Return one row for each step, in ascending order, from the events of each attempt, oldest first.

    Names are ``train/loss``, ``train/lr``, ``val/loss`` and those of scores.
    """
    rows: dict[int, dict[str, float]] = {}
    for events in attempts:
        for event in events:
            step = event.get("step")
            if not isinstance(step, int):
                continue
            if event.get("event") == "started":
                rows = {before: values for before, values in rows.items() if before <= step}
            elif found := _measured(event):
                rows.setdefault(step, {}).update(found)
    return sorted(rows.items())


def _measured(event: Mapping[str, Any]) -> dict[str, float]:
    given: dict[str, Any] = {}
    match event.get("event"):
        case "step":
            given = {"train/loss": event.get("loss"), "train/lr": event.get("lr")}
        case "validation":
            given = {name: value for name, value in event.items() if name not in ("event", "step")}
        case "score":
            given = scores if isinstance(scores := event.get("scores"), dict) else {}
    return {str(name): float(value) for name, value in given.items() if _is_number(value)}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
