"""The warm spare: a process that has imported what it needs, and tried the GPU, before there is work.

A GPU works once a process has said so; one that ends without a verdict, or gives none for long, says that it
does not.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path

from trainer.patience import one_line
from trainer.rundir import EXIT_COMPLETE, EXIT_PREEMPTED, GPU_CHECK, GPU_WORKS
from trainer.training_process import STUCK, TrainingProcess

from .canary import LOOKING

FIRST_PAUSE_S = 15.0
LONGEST_PAUSE_S = 240.0
"""Between tries of a GPU that does not work."""
VERDICT_S = 180.0
"""So long a process may take to import what it needs and to try the GPU."""

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
        self.problem = LOOKING if check_gpu else ""
        """Why nothing can be trained: the GPU was not tried, or does not work, or a dead run holds it."""
        self._verdict = folder / "gpu-check"
        self._check_gpu = check_gpu
        self._make = make
        self._first_pause_s = self._pause_s = pause_s
        self._process: TrainingProcess | None = None
        self._next_try = float("-inf")
        self._given = False
        self._silent_since: float | None = None

    def renew(self) -> None:
        """Start the next process, if the one before is somebody else's now, or gone."""
        if self._process and not self._given and self._process.exit_code is None:
            return
        self._given = False
        self._silent_since = None
        self._verdict.unlink(missing_ok=True)
        self._process = self._make({GPU_CHECK: str(self._verdict)} if self._check_gpu else {})

    def take(self) -> TrainingProcess | None:
        """Give the process away; None if its GPU is to be tried first and it is not there any more."""
        if not self._given and not self._check_gpu:
            self.renew()
        process = self._process
        if self._given or process is None or process.exit_code is not None:
            return None
        self._given = True
        return process

    def ended(self, code: int) -> str:
        """See what the end of the process that was given away says of the node; returns the problem.

        Args:
            code: That of the attempt, which may have ended for another reason.
        """
        if self._given and self._process:
            if self._process.stuck:
                self.problem = STUCK
            elif code == self._process.exit_code and code not in (EXIT_COMPLETE, EXIT_PREEMPTED):
                self._judge(code)
        return self.problem

    def tend(self, now: float) -> None:
        """See what came of the check, and try again what failed, ever more seldom."""
        if self._process is None or self._process.stuck:
            return
        if self.problem == STUCK:
            self.problem = LOOKING if self._check_gpu else ""
            self.renew()
        if not self._check_gpu:
            return
        if not self._given:
            self._judge(self._process.exit_code)
            self._lose_patience(now)
        if self.problem and self._process.exit_code is not None:
            if self._next_try == float("-inf"):
                self._next_try = now + self._pause_s
            elif now >= self._next_try:
                self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
                self._next_try = float("-inf")
                self.renew()

    def _judge(self, code: int | None) -> None:
        if not self._check_gpu:
            return
        verdict = ""
        with contextlib.suppress(OSError):
            verdict = self._verdict.read_text()
        if verdict == GPU_WORKS:
            self.problem, self._pause_s = "", self._first_pause_s
        elif verdict:
            self.problem = one_line(verdict)
        elif code is not None:
            self.problem = f"its GPU could not be tried: the process that tried it ended with code {code}"

    def _lose_patience(self, now: float) -> None:
        """End a process that hangs in the check."""
        if self._verdict.exists() or self._process is None or self._process.exit_code is not None:
            return
        self._silent_since = now if self._silent_since is None else self._silent_since
        if now - self._silent_since > VERDICT_S:
            self.problem = f"its GPU could not be tried: no answer in {VERDICT_S:.0f} s"
            self._process.kill()

    def kill(self) -> None:
        if self._process:
            self._process.kill()
