"""How a supervisor deals with a store that is away, and with what a trainer says of its errors."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from storage.errors import AccessDenied, Unavailable
from storage.redaction import printable, redacted

STORE_PATIENCE_S = 120.0
"""How long a store that does not answer, or refuses credentials that a person may renew, is asked again."""
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 15.0
MAX_ERROR_CHARACTERS = 1000

T = TypeVar("T")


def patiently(call: Callable[[], T], stopping: threading.Event) -> T:
    """Call until the store answers: one that is away for a while delays an attempt and does not end it.

    The time counts from the first failure: a call that was at work for long before it has its tries, too.

    Raises:
        AccessDenied, Unavailable: It still failed after ``STORE_PATIENCE_S``, or a stop was asked for.
    """
    deadline: float | None = None
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            return call()
        except (Unavailable, AccessDenied):
            now = time.monotonic()
            deadline = now + STORE_PATIENCE_S if deadline is None else deadline
            if now + pause_s > deadline or stopping.wait(pause_s):
                raise
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def one_line(text: str) -> str:
    """Return text as a record may carry it: one bounded line of valid UTF-8, without secrets."""
    line = redacted(" ".join(printable(text.encode("utf-8", "backslashreplace").decode()).split()))
    return line if len(line) <= MAX_ERROR_CHARACTERS else f"{line[:MAX_ERROR_CHARACTERS]}…"
