"""One training process as its supervisor holds it: started warm, given work, asked to stop, killed.

The process leads its own group. Its stdin is a pipe that only we hold: when we die, however we die, the pipe
closes and the process kills its group.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

REAP_S = 60.0
"""A killed process that is not gone by then hangs in the kernel, and holds its GPU."""

STUCK = "the trainer hangs in the kernel and cannot be killed"

SECRETS = ("AWS_", "RAY_", "SLACK_")
"""Prefixes of environment variables that a training process has no use for: it never talks to the store."""


TRAINER = (sys.executable, "-m", "trainer.process")
PLAYER = (sys.executable, "-m", "trainer.command")
"""For a run with a ``command``; a ``TRAINER`` that waits already becomes one."""


class TrainingProcess:
    """A ``python -m trainer.process`` that imports what it needs and waits for its run directory.

    Args:
        command: Something else that honours the contract in ``rundir``.
        extra: Environment variables, besides ours.
    """

    def __init__(
        self,
        command: Sequence[str] = TRAINER,
        extra: Mapping[str, str] | None = None,
    ) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(SECRETS)}
        environment |= {"PYTHONUNBUFFERED": "1", **(extra or {})}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            start_new_session=True,
            env=environment,
        )
        self._killed_in_vain = False
        self._gone = False
        """It is reaped and its group was killed: its number may be somebody else's now."""

    @property
    def pid(self) -> int:
        return self._process.pid

    def begin(self, run_dir: Path) -> None:
        """Hand over the run directory. A process that is already gone shows in ``exit_code``."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"run_dir": str(run_dir)}).encode() + b"\n")
            self._process.stdin.flush()

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    def terminate(self) -> None:
        """Ask it to finish the step, checkpoint and exit 75."""
        if self.exit_code is None:
            self._process.send_signal(signal.SIGTERM)

    def dump(self) -> None:
        """Ask it to write the stacks of all its threads into its log."""
        if self.exit_code is None:
            self._process.send_signal(signal.SIGUSR1)

    @property
    def stuck(self) -> bool:
        """Whether it was killed and is there all the same: it hangs in the kernel, as in a driver."""
        return self._killed_in_vain and self.exit_code is None

    def kill(self) -> None:
        """End it and everything it started, at once. Waits ``REAP_S`` for one that is ``stuck``, once."""
        if self._gone:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        try:
            self._process.wait(timeout=0.0 if self._killed_in_vain else REAP_S)
        except subprocess.TimeoutExpired:
            self._killed_in_vain = True
            return
        self._gone = True
        if self._process.stdin:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
