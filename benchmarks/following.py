"""Attempts as their run directories tell of them: their steps, when these were seen, and their losses."""

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

from harness import BenchmarkFailed

from trainer.rundir import RunDir

LOOK_S = 0.02


class Attempt:
    """One attempt. What it has told is known also when its folder is gone."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.resumed = 0
        self.losses: dict[int, float] = {}
        """By step."""
        self.seen_at: list[float] = []
        """When each was seen, in Unix seconds."""
        self._file: IO[bytes] | None = None
        self._rest = b""

    @property
    def newest(self) -> int:
        return max(self.losses, default=self.resumed)

    def look(self) -> None:
        if self._file is None:
            with contextlib.suppress(OSError):
                self._file = RunDir(self.root).events.open("rb")
        if self._file is None:
            return
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        now = time.time()
        for line in lines:
            match json.loads(line):
                case {"event": "started", "step": int(step)}:
                    self.resumed = step
                case {"event": "step", "step": int(step), "loss": loss}:
                    self.losses[step] = loss
                    self.seen_at.append(now)

    def stepped(self) -> bool:
        """Look, and say whether it has made a step."""
        self.look()
        return bool(self.losses)

    def close(self) -> None:
        if self._file:
            self._file.close()


class Attempts:
    """All attempts of one run, in the order in which they appeared.

    Args:
        find: Returns the run directories that are there now.
    """

    def __init__(self, find: Callable[[], Iterable[Path]]) -> None:
        self._find = find
        self.all: list[Attempt] = []

    @property
    def newest(self) -> Attempt | None:
        return self.all[-1] if self.all else None

    def look(self) -> None:
        known = {attempt.root for attempt in self.all}
        self.all += [Attempt(root) for root in sorted(self._find()) if root not in known]
        for attempt in self.all:
            attempt.look()

    def wait(
        self, condition: Callable[[], Any], what: str, timeout_s: float, *, every_s: float = LOOK_S
    ) -> Any:
        """Return the first true value of ``condition``, looking at all attempts meanwhile.

        Raises:
            BenchmarkFailed: There was none in time.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.look()
            if value := condition():
                return value
            time.sleep(every_s)
        raise BenchmarkFailed(f"waited {timeout_s:.0f} s in vain for {what}")

    def longest_pause_s(self, start: float, end: float) -> float:
        """The longest time between two steps of anybody's, of which at least one lies in this time."""
        beats = sorted(at for attempt in self.all for at in attempt.seen_at)
        pairs = itertools.pairwise(beats)
        return max((b - a for a, b in pairs if b >= start and a <= end), default=0.0)

    def close(self) -> None:
        for attempt in self.all:
            attempt.close()


def lost_steps(old: Attempt, new: Attempt) -> int:
    """How many steps were trained for nothing, after a check that what was trained again came out the same.

    Raises:
        BenchmarkFailed: A step had another loss.
    """
    for step, loss in new.losses.items():
        if old.losses.get(step, loss) != loss:
            raise BenchmarkFailed(f"step {step} had another loss when it was trained again")
    return max(0, old.newest - new.resumed)
