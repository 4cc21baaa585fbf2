"""Who descends from whom: ends a process with its parent, and a cluster with all that ever belonged to it.

A cluster's host that is killed leaves its processes to nobody. Whoever started it may end them, and only
them: a process is known by its pid and by when it began, so a pid that was given out again is left alone.
"""

import contextlib
import os
import time
from typing import NoReturn

import psutil

ORPHAN_CHECK_S = 0.5


class Lineage:
    """A process and everything that was seen to descend from it."""

    def __init__(self, pid: int) -> None:
        self._known: set[psutil.Process] = set()
        with contextlib.suppress(psutil.NoSuchProcess):
            self._known.add(psutil.Process(pid))

    def look(self) -> None:
        """Learn of those that began since the last look, and forget those that are gone."""
        self._known = {process for process in self._known if _lives(process)}
        children: dict[int, list[psutil.Process]] = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                children.setdefault(process.ppid(), []).append(process)
        todo = list(self._known)
        while todo:
            parent = todo.pop()
            for child in children.get(parent.pid, ()):
                if child not in self._known:
                    self._known.add(child)
                    todo.append(child)

    def living(self) -> list[psutil.Process]:
        """Those that were known at the last look and live."""
        return [process for process in self._known if _lives(process)]

    def kill(self, timeout_s: float = 10.0) -> int:
        """End what lives of it, and return how many that were."""
        killed: set[psutil.Process] = set()
        for _ in range(3):  # what they start while they are being killed is seen by the next look
            self.look()
            doomed = self.living()
            if not doomed:
                break
            for process in doomed:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            deadline = time.monotonic() + timeout_s
            while any(map(_lives, doomed)) and time.monotonic() < deadline:
                time.sleep(
                    0.01
                )  # one that is dead and not yet reaped has ended: that is its new parent's affair
            killed.update(doomed)
        return len(killed)


def end_with_parent(parent_pid: int) -> NoReturn:
    """End this process, at once and whatever it does, when ``parent_pid`` is not its parent any more.

    Pipes close by that, so the training processes that an agent holds are killed too.
    """
    while os.getppid() == parent_pid:
        time.sleep(ORPHAN_CHECK_S)
    os._exit(1)


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
