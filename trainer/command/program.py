"""The processes of a program: the one that was started, and whatever it starts.

They are in our own process group, so they end with us, however we end. A launcher may die of a signal while
what it launched still saves itself; so we adopt orphans (Linux), wait for them too, and know how they ended.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

_PR_SET_CHILD_SUBREAPER = 36


class Program:
    """Started when it is made.

    Raises:
        OSError: It cannot be started.
    """

    def __init__(self, words: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
        _adopt_orphans()
        self._process = subprocess.Popen(
            words,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert self._process.stdout is not None
        self.output = self._process.stdout
        self.codes: list[int] = []
        """How those of its processes ended that we saw end, in that order; negative for a signal."""
        self._own_end_seen = False

    @property
    def exit_code(self) -> int | None:
        """Of the process that was started."""
        self._note_own_end()
        return self._process.returncode

    def living(self) -> list[psutil.Process]:
        """Return its processes that still run, having noted the ends of those that do not.

        Looks at every process of the machine: not to be asked all the time.
        """
        self._note_own_end()
        me = psutil.Process()
        for child in me.children():
            if child.pid != self._process.pid:
                with contextlib.suppress(ChildProcessError):
                    pid, status = os.waitpid(child.pid, os.WNOHANG)
                    if pid:
                        self.codes.append(os.waitstatus_to_exitcode(status))
        return [child for child in me.children(recursive=True) if _is_alive(child)]

    def _note_own_end(self) -> None:
        if not self._own_end_seen and (code := self._process.poll()) is not None:
            self._own_end_seen = True
            self.codes.append(code)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to all its processes."""
        for process in self.living():
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)


def end_like(code: int) -> int:
    """Return the exit code for a program that ended with ``code``; where a signal ended it, die of it too.

    Shells and launchers say 137 for a signal 9.
    """
    number = -code if code < 0 else code - 128
    if number in (signal.SIGKILL, signal.SIGABRT, signal.SIGBUS, signal.SIGSEGV, signal.SIGTERM):
        with contextlib.suppress(OSError):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    return code


def _is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def _adopt_orphans() -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
