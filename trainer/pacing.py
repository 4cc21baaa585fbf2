"""Carries the interval between checkpoints from the supervisor, who measures, to the training process.

The supervisor replaces ``interval.json`` in the run directory by rename; the process looks once a second
whether it changed. Imports no torch.
"""

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable

import psutil
from pydantic import Field, ValidationError

from .config import Frozen
from .interval import Interval, choose
from .rundir import Options, RunDir, append_event

POLL_S = 1.0
REVIEW_S = 10.0
"""How often the supervisor thinks about the interval without news: a node grows older."""
SAME = 0.1
"""An interval that would change by less than this share stays."""
_LAST = 5


class Pace(Frozen):
    """What ``interval.json`` holds."""

    every_s: float = Field(gt=0)
    why: str = ""


class Pacer:
    """The supervisor's side: measures, decides, writes. Does nothing unless the interval is ``auto``."""

    def __init__(
        self, run_dir: RunDir, options: Options, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._run_dir = run_dir
        self._policy = options.checkpoint
        self._lifetimes = options.lifetimes
        self._clock = clock
        self._born = clock() - node_age_s()
        self._costs_s: deque[float] = deque(maxlen=_LAST)
        self._uploads_s: deque[float] = deque(maxlen=_LAST)
        self._lock = threading.Lock()
        self._said: Interval | None = None
        self._said_measured = False
        self._reviewed_at = float("-inf")

    def checkpointed(self, event: dict[str, object]) -> None:
        """Take in a ``checkpoint`` event of the training process."""
        parts = (event.get("stall_s"), event.get("inflation_s", 0.0))
        with self._lock:
            self._costs_s.append(sum(float(part) for part in parts if isinstance(part, int | float)))
            self._reviewed_at = float("-inf")

    def uploaded(self, seconds: float) -> None:
        """Take in how long a checkpoint took to reach the store."""
        with self._lock:  # another thread publishes
            self._uploads_s.append(seconds)
            self._reviewed_at = float("-inf")

    def review(self) -> None:
        """Write the interval down if it is another, or measured at last. A full disk leaves the old one."""
        now, policy = self._clock(), self._policy
        if policy.auto_max_s is None or now - self._reviewed_at < REVIEW_S:
            return
        with self._lock:
            self._reviewed_at = now
            cost_s, upload_s = _mean(self._costs_s), _mean(self._uploads_s)
        chosen = choose(
            self._lifetimes,
            age_s=now - self._born,
            cost_s=cost_s,
            upload_s=upload_s,
            max_s=policy.auto_max_s,
        )
        said, measured = self._said, cost_s is not None
        same = said is not None and abs(chosen.every_s - said.every_s) <= SAME * said.every_s
        if same and measured == self._said_measured:  # the first measurement is told, whatever comes of it
            return
        with contextlib.suppress(OSError):
            temporary = self._run_dir.interval.with_suffix(".tmp")
            temporary.write_text(Pace(every_s=chosen.every_s, why=chosen.why).model_dump_json())
            os.replace(temporary, self._run_dir.interval)
            self._said, self._said_measured = chosen, measured


class PaceReader:
    """The training process's side."""

    def __init__(
        self, run_dir: RunDir, options: Options, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._run_dir = run_dir
        self._is_auto = options.checkpoint.auto_max_s is not None
        self._every_s = options.checkpoint.every_s
        self._clock = clock
        self._looked_at = float("-inf")
        self._seen: tuple[int, int] | None = None

    def every_s(self, step: int) -> float | None:
        """Return the seconds between checkpoints now, and tell in an event when they change."""
        now = self._clock()
        if self._is_auto and now - self._looked_at >= POLL_S:
            self._looked_at = now
            with contextlib.suppress(OSError, ValidationError):
                status = self._run_dir.interval.stat()
                if (identity := (status.st_mtime_ns, status.st_ino)) != self._seen:
                    pace = Pace.model_validate_json(self._run_dir.interval.read_bytes())
                    self._seen, self._every_s = identity, pace.every_s
                    append_event(
                        self._run_dir.events, "interval", step=step, every_s=pace.every_s, why=pace.why
                    )
        return self._every_s


class Inflation:
    """What checkpoints cost beside the stall: steps take longer while one is being written."""

    def __init__(self) -> None:
        self._calm_s: float | None = None
        self._extra_s = 0.0

    def step(self, step_s: float, *, writing: bool) -> None:
        """Take in one step; ``writing``: a checkpoint was being written while it ran."""
        if writing:
            self._extra_s += max(0.0, step_s - self._calm_s) if self._calm_s is not None else 0.0
        else:
            self._calm_s = step_s if self._calm_s is None else 0.8 * self._calm_s + 0.2 * step_s

    def taken(self) -> float:
        """Return the seconds that were lost since the last call."""
        extra_s, self._extra_s = self._extra_s, 0.0
        return extra_s


def node_age_s() -> float:
    """How long this node has lived, by its first process: right also in a container on an older host."""
    try:
        return max(0.0, time.time() - float(psutil.Process(1).create_time()))
    except psutil.Error:
        return time.monotonic()


def _mean(values: deque[float]) -> float | None:
    return sum(values) / len(values) if values else None
