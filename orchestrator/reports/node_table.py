"""The table of ``orchestrate nodes``."""

import time
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from .nodes import DRAINED, DRAINING, GONE, NOT_USED, SILENT, UP, NodeView

STYLES = {UP: "green", DRAINING: "yellow", DRAINED: "yellow", NOT_USED: "yellow", SILENT: "red", GONE: "dim"}
RUNS_SHOWN = 4


def table(sweep: str, views: Sequence[NodeView], now: float | None = None) -> Table:
    """Return a row per node."""
    shown = Table(box=None, pad_edge=False, header_style="bold", title=None)
    for name in ("SWEEP", "NODE", "STATE", "BUSY/SLOTS", "UP", "SILENT", "STORE", "RUNS", "WHY"):
        right = name in ("BUSY/SLOTS", "UP", "SILENT", "STORE")
        shown.add_column(name, justify="right" if right else "left", no_wrap=name not in ("RUNS", "WHY"))
    for view in views:
        more = f" and {len(view.runs) - RUNS_SHOWN} more" if len(view.runs) > RUNS_SHOWN else ""
        shown.add_row(
            sweep,
            Text(view.node),
            Text(view.state, style=STYLES.get(view.state, "default")),
            f"{view.busy}/{view.slots}",
            _since(view.up_since, time.time() if now is None else now),
            f"{view.silent_s:.0f}s" if view.state == SILENT else "",
            _speed(view),
            Text(", ".join(view.runs[:RUNS_SHOWN]) + more),
            Text(view.why),
        )
    return shown


def _speed(view: NodeView) -> str:
    """To the store, as a small object went there."""
    return "" if view.up_mb_s is None else f"{view.up_mb_s:.2g} MB/s"


def _since(at: float | None, now: float) -> str:
    if at is None:
        return ""
    seconds = max(0, round(now - at))
    if seconds < 120:
        return f"{seconds}s"
    return f"{seconds // 60}m" if seconds < 7200 else f"{seconds // 3600}h"
