"""``orchestrate supervise``: keeps the head and the controller of a sweep up until the sweep is over.

A loop around two processes: the Ray head, if it is ours to start, and ``orchestrate resume`` (``sweep`` where
there is a file: for one that was submitted it is the same), which starts the controller if it is gone and
waits for the end of the sweep. Neither knows more than the store, so whatever dies is started again. So is
this process: it keeps nothing that its successor would miss.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import FrameType

from storage.errors import StorageError
from storage.object_store import ObjectStore

from ..control.term import in_office
from .heads import Head, HeadFailed
from .supervision import EXIT_TAKEN_OVER, Tries, failed, final

POLL_S = 1.0
KILL_S = 10.0

Say = Callable[[str], None]


class Supervisor:
    """Supervises one sweep. ``run`` blocks until the sweep is over, or ``stop`` is set."""

    def __init__(
        self,
        name: str,
        store: ObjectStore,
        head: Head,
        *,
        say: Say,
        stop: threading.Event,
        command: list[str],
        hostname: str = "",
    ) -> None:
        """``command``: ``resume`` or ``sweep``; it is given the head's ``--address``."""
        self._name = name
        self._store = store
        self._head = head
        self._say = say
        self._stop = stop
        self._command = command
        self._hostname = hostname or socket.gethostname()
        self._tries = Tries()
        self._starts = Tries()
        """Those of the head: a child that then works is not to wait for what they cost."""
        self._term: str | None = None
        """The newest term before the child was started, empty if none was; None: the store did not say."""

    def run(self) -> int | None:
        """Return the exit code; None if it was asked to stop. The head is left as it is."""
        while not self._stop.wait(self._starts.pause_s or self._tries.pause_s):
            code = self._try()
            if code is not None:
                return code
        return None

    def _try(self) -> int | None:
        """One life of the child; returns the code to exit with, or None if there is to be another."""
        try:
            was_owned = self._head.owned
            address = self._head.ensure()
        except HeadFailed as error:
            self._starts = failed(self._starts, None, 0.0)
            self._say(f"{error}; again in {self._starts.pause_s:g} s")
            return None
        self._starts = Tries()
        if self._head.owned and not was_owned:
            self._say(f"started a head at {address}")
        self._remember_term()
        began = time.monotonic()
        code = self._watch(address)
        lasted_s = time.monotonic() - began
        if self._stop.is_set():
            return None
        if code is None:
            ours = "the head" if self._head.owned else "the head, which somebody else started,"
            self._head.restart()
            self._again(None, lasted_s, f"{ours} at {address} is gone")
            return None
        over = final(code)
        if over is not None:
            self._say(f"{self._name} is over, exit code {over}" if over in (0, 100) else f"exit code {over}")
            return over
        if other := self._taken_over(address):
            self._say(f"{self._name} was taken over by {other}: it is supervised there")
            return EXIT_TAKEN_OVER
        self._again(code, lasted_s, f"what worked on it ended with code {code}")
        if self._head.owned and self._tries.head_is_suspect:
            self._say(f"the head at {address} answers, but nothing works there: it is started anew")
            self._head.restart()
            self._tries = replace(self._tries, suspicious=0)
        return None

    def _watch(self, address: str) -> int | None:
        """Run the child; returns its exit code, or None if the head went, or we are to stop."""
        child = subprocess.Popen(
            [*self._command, "--address", address], stdin=subprocess.DEVNULL, start_new_session=True
        )
        self._say(f"resuming {self._name} at {address} (pid {child.pid})")
        try:
            while (code := child.poll()) is None:
                if self._head.down():
                    return None
                if self._stop.wait(POLL_S):
                    return None
            return code
        finally:
            if child.poll() is None:
                child.kill()  # it only watches: the controller lives in the cluster
            # One that the kernel holds is left to itself: it is no reason to end, and the head with us.
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(KILL_S)

    def _again(self, code: int | None, lasted_s: float, why: str) -> None:
        self._tries = failed(self._tries, code, lasted_s)
        self._say(f"{why}; again in {self._tries.pause_s:g} s")

    def _remember_term(self) -> None:
        """Who took office earlier may be dead, as the head that this one came to replace."""
        with contextlib.suppress(StorageError):
            holder = in_office(self._store, self._name)
            self._term = holder.term if holder else ""

    def _taken_over(self, address: str) -> str | None:
        """Who took office since the child was started, if that is not a controller on our own head."""
        if not self._head.owned or self._term is None:
            return None
        with contextlib.suppress(StorageError):
            holder = in_office(self._store, self._name)
            if holder and holder.term > self._term and holder.is_elsewhere(self._hostname, address):
                return f"the controller on {holder.host} (pid {holder.pid})"
        return None


def resuming(name: str, store_url: str) -> list[str]:
    """Return what the supervisor runs, over and over, for a sweep that was submitted."""
    return [sys.executable, "-m", "orchestrator", "resume", name, "--store", store_url]


def sweeping(file: str) -> list[str]:
    """The same for a sweep file: the first time it submits it."""
    return [sys.executable, "-m", "orchestrator", "sweep", file, "--yes"]


@contextlib.contextmanager
def stopped_by_signals(stop: threading.Event) -> Iterator[list[int]]:
    """While inside, SIGTERM, SIGINT and SIGHUP set ``stop``; yields the signals that came."""
    came: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        came.append(number)
        stop.set()

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def said(line: str) -> None:
    """Print one event, with its time, for a person and for a journal."""
    now = time.strftime("%H:%M:%S")
    with contextlib.suppress(OSError):  # a journal that is gone is no reason to stop
        print(f"{now} supervise[{os.getpid()}]: {line}", file=sys.stderr, flush=True)
