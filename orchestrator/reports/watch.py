"""The live view of a sweep: a table and a progress bar, redrawn while it runs. Ctrl-C only leaves it."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console, Group
from rich.live import Live as RichLive
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from storage.object_store import ObjectStore

from ..control.cluster import RemoteController
from ..errors import OrchestrateError
from ..grid.sweep import Sweep
from ..usual_store import store_flag
from .sweep_logs import SweepLogs
from .view import OVER, RunView, Status, best, described, rows

STYLES = {
    Status.RUNNING: "cyan",
    Status.RECOVERING: "yellow",
    Status.SUCCEEDED: "green",
    Status.FAILED: "red",
    Status.CANCELLED: "dim",
    Status.CANCELLING: "dim",
}

ABANDONED_S = 30.0
"""A controller that died is back sooner."""

UNLIMITED = 100_000
"""Columns of a table that goes to a file or a pipe: nothing is cut off there."""


class Watcher:
    """Reads a sweep's logs again and again, each time only what is new."""

    def __init__(self, sweep: Sweep, store: ObjectStore) -> None:
        self._sweep = sweep
        self._logs = SweepLogs(sweep, store)

    def look(self, controller: RemoteController | None = None) -> list[RunView]:
        """Return the rows as of now; a store that does not answer leaves the last known ones."""
        self._logs.look()
        training = controller.training() if controller else {}
        return rows(self._sweep, self._logs.states, training, self._logs.damaged)


def watch(
    sweep: Sweep,
    store: ObjectStore,
    *,
    controller: Callable[[], RemoteController | None],
    every_s: float = 1.0,
    on_look: Callable[[list[RunView]], None] | None = None,
) -> list[RunView]:
    """Show the sweep until every run is over; off a terminal, print a line per change instead.

    Args:
        controller: Returns the controller for live steps, or None; it may come back as another one.
        on_look: Called with the rows each time.

    Raises:
        OrchestrateError: Nobody has worked on the sweep for ``ABANDONED_S``.
    """
    screen = Console(stderr=True)
    watcher = Watcher(sweep, store)
    draw = _drawn(screen, sweep) if screen.is_terminal else _printed()
    with draw as show:
        worked_on_at = time.monotonic()
        while True:
            present = controller()
            views = watcher.look(present)
            show(views)
            if present:
                worked_on_at = time.monotonic()
            elif time.monotonic() - worked_on_at > ABANDONED_S and any(v.status not in OVER for v in views):
                raise OrchestrateError(
                    f"no controller works on {sweep.name} on this cluster — "
                    f"orchestrate resume {sweep.name}{store_flag(store.url)}"
                )
            if on_look:
                on_look(views)
            if all(view.status in OVER for view in views):
                return views
            time.sleep(every_s)


def console(*, stderr: bool = False) -> Console:
    """Return a console that fits what it prints to a terminal, and prints it whole to anything else."""
    made = Console(stderr=stderr)
    return made if made.is_terminal else Console(stderr=stderr, width=UNLIMITED)


def table(sweep: Sweep, views: list[RunView], now: float | None = None) -> Table:
    """Return the status table."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for name, style in (("RUN", "left"), ("PARAMS", "left"), ("STATUS", "left"), ("STEP", "right")):
        shown.add_column(name, justify=style, no_wrap=name != "PARAMS")  # type: ignore[arg-type]
    for name in (
        "%",
        "LOSS",
        sweep.metric.name.upper() if sweep.metric else "METRIC",
        "ATTEMPTS",
        "LOST",
        "LAST-CKPT",
    ):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("NODE", no_wrap=True)
    winner = best(sweep, views)
    for view in views:
        star = " ★" if winner and view.run == winner.run else ""
        shown.add_row(
            view.run + star,
            Text(described(view.params)),  # a value may look like markup
            f"[{STYLES.get(view.status, 'default')}]{view.status}[/]",
            f"{view.step}/{view.max_steps}",
            f"{100 * view.step // view.max_steps}",
            _number(view.loss),
            _number(view.metric),
            str(view.attempts),
            f"{view.lost_steps}{'+' if view.lost_unreported else ''}",
            _age(view.last_commit_at, time.time() if now is None else now),
            Text(view.node or ""),
        )
    return shown


@contextlib.contextmanager
def _drawn(screen: Console, sweep: Sweep) -> Iterator[Callable[[list[RunView]], None]]:
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    task = progress.add_task(sweep.name, total=sum(r.spec.max_steps for r in sweep.runs))
    with RichLive(console=screen, refresh_per_second=4) as live:

        def show(views: list[RunView]) -> None:
            progress.update(task, completed=sum(view.step for view in views))
            live.update(Group(table(sweep, views), progress))

        yield show


@contextlib.contextmanager
def _printed() -> Iterator[Callable[[list[RunView]], None]]:
    last: dict[str, tuple[Status, int]] = {}

    def show(views: list[RunView]) -> None:
        for view in views:
            tenth = 10 * view.step // view.max_steps
            if last.get(view.run) != (view.status, tenth):
                last[view.run] = (view.status, tenth)
                where = f" on {view.node}" if view.node else ""
                print(f"{view.run}: {view.status} step {view.step}/{view.max_steps}{where}", file=sys.stderr)

    yield show


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _age(at: float | None, now: float) -> str:
    if at is None:
        return ""
    seconds = max(0, round(now - at))
    return (
        f"{seconds}s" if seconds < 120 else f"{seconds // 60}m" if seconds < 7200 else f"{seconds // 3600}h"
    )
