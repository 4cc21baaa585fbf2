"""Whether a node can train at all, asked before it gets a run: room on its disk, the store, its clock.

``unfit`` is the rule, ``Canary`` asks in the background and again while the answer is bad. Its GPU is tried
by the warm process (``spare``).
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from storage import layout
from storage.doctor.checks import judged_skew
from storage.errors import StorageError
from storage.object_store import ObjectStore
from trainer.patience import one_line

LOOKING = "it is being looked at"
"""Not known to be fit yet, so not fit."""
LEAST_FREE_BYTES = 100_000_000
"""For logs, samples and a small adapter."""
CHECKPOINTS = 2
"""So many must fit: one is written while the one before is sent."""
FIRST_PAUSE_S = 15.0
LONGEST_PAUSE_S = 240.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What was seen of a node."""

    disk_free_bytes: int | None = None
    problem: str = ""
    """Why the store, or the disk, cannot be used at all."""
    clock_ahead_s: float | None = None
    """Against the store's clock; None where that tells none."""


def unfit(sight: Sight, checkpoint_bytes: int) -> str:
    """Return why a node is not fit to train, or "".

    Args:
        checkpoint_bytes: The largest that the sweep has made so far.
    """
    if sight.clock_ahead_s is not None:
        skew = judged_skew(sight.clock_ahead_s)
        if skew.ok is False:  # then the store refuses everything, and says less clearly why
            return f"{skew.said}: {skew.todo}"
    if sight.problem:
        return sight.problem
    needed = max(LEAST_FREE_BYTES, CHECKPOINTS * checkpoint_bytes)
    if sight.disk_free_bytes is not None and sight.disk_free_bytes < needed:
        return (
            f"its disk has room for {sight.disk_free_bytes / 1e9:.2f} GB, and {CHECKPOINTS} checkpoints take "
            f"{needed / 1e9:.2f}: make room, or point TMPDIR to a larger one"
        )
    return ""


def look(store: ObjectStore | None, sweep: str, scratch: Path) -> Sight:
    """Look at this node; never raises.

    Args:
        store: None for an agent that has no keys: its first request for a grant will tell.
    """
    try:
        free = shutil.disk_usage(scratch).free
    except OSError as error:
        return Sight(problem=f"its disk cannot be used: {error}")
    ahead_s: float | None = None
    problem = ""
    if store is not None:
        try:
            ahead_s = _clock_ahead_s(store)
            if store.head(layout.sweep_spec(sweep)) is None:
                problem = f"it sees no sweep {sweep} in {store.url}: is that the same store on this node?"
        except (StorageError, OSError) as error:
            problem = f"it cannot use the store: {one_line(f'{type(error).__name__}: {error}')}"
    return Sight(disk_free_bytes=free, problem=problem, clock_ahead_s=ahead_s)


def _clock_ahead_s(store: ObjectStore) -> float | None:
    server_time = getattr(store, "server_time", None)  # a bucket's; a folder has no clock of its own
    if server_time is None:
        return None
    before = time.time()
    told = server_time()
    return None if told is None else float((before + time.time()) / 2 - told.timestamp() - 0.5)


class Canary:
    """Looks at this node once started, and again while it is unfit or when asked to.

    Args:
        ask: Says why the node is unfit, or "".
        on_change: Called from another thread after ``problem`` has changed.
    """

    def __init__(
        self, ask: Callable[[], str], on_change: Callable[[], None], *, pause_s: float = FIRST_PAUSE_S
    ) -> None:
        self.problem = LOOKING
        self._ask = ask
        self._on_change = on_change
        self._first_pause_s = pause_s
        self._again = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._run, name="canary", daemon=True).start()

    def again(self) -> None:
        """Look once more: something went wrong on this node."""
        self._again.set()

    def _run(self) -> None:
        pause_s = self._first_pause_s
        while True:
            self._again.clear()
            try:
                problem = self._ask()
            except Exception:  # a check that breaks says nothing about the node
                logger.exception("the node could not be checked")
                problem = ""
            if problem != self.problem:
                self.problem = problem
                self._on_change()
            self._again.wait(pause_s if problem else None)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S) if problem else self._first_pause_s
