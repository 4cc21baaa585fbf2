"""The warm spare: a process that has imported what it needs, and tried the GPU, before there is work."""

import contextlib
from collections.abc import Callable
from pathlib import Path

from trainer.rundir import EXIT_UNFIT, GPU_CHECK, GPU_WORKS
from trainer.training_process import TrainingProcess

FIRST_PAUSE_S = 15.0
LONGEST_PAUSE_S = 240.0
"""Between tries of a GPU that does not work."""

Make = Callable[[dict[str, str]], TrainingProcess]


class WarmSpare:
    """Used by one thread, which owns the processes; only ``problem`` is read by others."""

    def __init__(
        self,
        folder: Path,
        *,
        check_gpu: bool,
        make: Make = lambda extra: TrainingProcess(extra=extra),
        pause_s: float = FIRST_PAUSE_S,
    ) -> None:
        self.problem = ""
        """Why the GPU cannot be used, as far as it was tried."""
        self._verdict = folder / "gpu-check"
        self._check_gpu = check_gpu
        self._make = make
        self._first_pause_s = self._pause_s = pause_s
        self._process: TrainingProcess | None = None
        self._next_try = float("-inf")
        self._given = False

    def renew(self) -> None:
        """Start the next process, if the one before is somebody else's now, or gone."""
        if self._process and not self._given and self._process.exit_code is None:
            return
        self._given = False
        self._verdict.unlink(missing_ok=True)
        self._process = self._make({GPU_CHECK: str(self._verdict)} if self._check_gpu else {})

    def take(self) -> TrainingProcess | None:
        """Give the process away; None if it is not there any more."""
        process = self._process
        if self._given or process is None or process.exit_code is not None:
            return None
        self._given = True
        return process

    def tend(self, now: float) -> None:
        """See what came of the check, and try again what failed, ever more seldom."""
        if not self._check_gpu or self._process is None:
            return
        self.read()
        if self.problem and self._process.exit_code is not None:
            if self._next_try == float("-inf"):
                self._next_try = now + self._pause_s
            elif now >= self._next_try:
                self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
                self._next_try = float("-inf")
                self.renew()

    def read(self) -> str:
        """Read the verdict, if there is one, and return the problem."""
        verdict = ""
        with contextlib.suppress(OSError):
            verdict = self._verdict.read_text()
        if verdict == GPU_WORKS:
            self.problem, self._pause_s = "", self._first_pause_s
        elif verdict:
            self.problem = verdict
        elif self._process and self._process.exit_code == EXIT_UNFIT:
            self.problem = "its GPU could not be tried"
        return self.problem

    def kill(self) -> None:
        if self._process:
            self._process.kill()
