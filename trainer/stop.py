"""SIGTERM sets a flag that the step loop polls; the handler does no work.

Until the first step there is nothing to save: then the handler ends the process at once.
"""

import os
import signal
from collections.abc import Callable

from .rundir import EXIT_PREEMPTED


class Stopped(Exception):
    """Raised inside long work between steps (sampling, validation, evaluation) once a stop was requested."""


class Stop:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.exit_at_once = False
        """While true, a signal ends the process without another instruction of ours."""
        self.alive: Callable[[], None] = lambda: None
        """Called where long work gets on."""
        self.left_s: Callable[[], float | None] = lambda: None
        """Seconds until a process that was asked to stop is killed; None: as long as it takes."""
        self._requested = False

    @property
    def requested(self) -> bool:
        return self._requested

    def check(self) -> None:
        """Raise ``Stopped`` if a stop was requested. Being here is a sign of life."""
        self.alive()
        if self.requested:
            raise Stopped

    def listen(self) -> None:
        """Obey SIGTERM. Call from the main thread."""
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        self._requested = True
        if self.exit_at_once:
            os._exit(EXIT_PREEMPTED)
