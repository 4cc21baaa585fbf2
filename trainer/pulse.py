"""Tells the supervisor, between events, that work goes on: by the time of a file, every now and then."""

import contextlib
import os
import time
from pathlib import Path


class Pulse:
    """Called wherever long work gets on; costs nothing most of the time."""

    def __init__(self, path: Path, every_s: float = 1.0) -> None:
        self._path = path
        self._every_s = every_s
        self._next = float("-inf")

    def __call__(self) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + self._every_s
        with contextlib.suppress(OSError):  # a run must not end for want of something to tell
            os.utime(self._path)
