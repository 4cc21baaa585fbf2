"""Waiting for what another thread or process does: for as long as a slow machine takes, never for a while."""

import time
from collections.abc import Callable

DEADLINE_S = 240.0
"""What has not happened by then never will."""


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.01)
