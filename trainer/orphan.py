"""A training process ends with whoever holds the other end of its stdin, and takes its children along.

On Linux the kernel itself sees to it: a pipe can signal a process group when its last writer is gone. So it
also works while the interpreter cannot run a thread, as in a call of a library that hangs without letting go
of its lock. The thread does the same elsewhere, and says so first where both work.

Until the process has read all that it is to read from stdin, the kernel's signal would end it too early. For
so long another thread looks, which takes nothing from the pipe.
"""

import contextlib
import fcntl
import os
import select
import signal
import sys
import threading

_F_SETSIG = 10
"""Linux; ``fcntl`` has no name for it before Python 3.13."""


def die_when_abandoned() -> None:
    """When nobody holds the other end of stdin any more, kill this process's group. Stdin stays readable."""
    _lead_group()
    threading.Thread(target=_watch_for_hang_up, daemon=True, name="abandoned").start()


def die_with_stdin() -> None:
    """When stdin ends, kill this process's group: the process and all that it started.

    Nothing may be written to stdin after this.
    """
    _lead_group()
    threading.Thread(target=_watch, daemon=True, name="stdin").start()
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # not a pipe, for example
            fcntl.fcntl(0, _F_SETSIG, signal.SIGKILL)
            fcntl.fcntl(0, fcntl.F_SETOWN, -os.getpgrp())
            fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)


def _lead_group() -> None:
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)  # never kill the group of whoever started us


def _watch_for_hang_up() -> None:
    hang_up = select.poll()
    hang_up.register(0, 0)  # a hang-up is told without being asked for
    if any(event & select.POLLHUP for _, event in hang_up.poll()):
        os.killpg(os.getpgrp(), signal.SIGKILL)


def _watch() -> None:
    while os.read(0, 4096):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)
