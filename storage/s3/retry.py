"""How often a request is sent again, and when: one budget for all layers.

A call that fails is repeated a few times with growing, fully random pauses, so that many clients of a store
that comes back do not come back at once. What a store object repeats in all is paid from one budget that only
answers refill: while the store is down the budget is soon empty, a call is then tried once, and how often
that happens is up to whoever calls again.
"""

import random
import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

TRIES = 4
"""Of one request within one call, the first included."""
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0
BUDGET = 10
"""Repetitions that a store object may spend on requests that all fail."""

T = TypeVar("T")


class Send(Protocol):
    """Does one request to the store, with its tries; ``S3Store`` has it."""

    def __call__(self, key: str, send: Callable[[Any], T], *, allow_s: float | None = None) -> T: ...


def pause_s(
    failures: int,
    retry_after_s: float | None = None,
    *,
    draw: Callable[[float, float], float] = random.uniform,
) -> float:
    """How long to wait before a request that has failed so often is sent again.

    Args:
        retry_after_s: What the server asked for; it is waited for, and the random part comes on top.
    """
    return draw(0.0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**failures)) + max(0.0, retry_after_s or 0.0)


class RetryBudget:
    """What one store object may still repeat. Shared by its threads."""

    def __init__(self, most: int = BUDGET) -> None:
        self._most = most
        self._left = most
        self._lock = threading.Lock()

    def spend(self) -> bool:
        """Take one repetition, if there is one."""
        with self._lock:
            if self._left == 0:
                return False
            self._left -= 1
            return True

    def refill(self) -> None:
        """Put one back: the store has answered."""
        with self._lock:
            self._left = min(self._most, self._left + 1)
