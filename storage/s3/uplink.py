"""What the way to the store can carry, and what follows for a file: whole or in parts, how many of them at
once, and from when on it is stuck.
"""

import threading

from .deadline import IDLE_S

PART_BYTES = 8 << 20
PARTS_AT_ONCE = 4
MOST_PARTS = 10_000
SINGLE_PUT_S = 2.0
"""A file that the uplink takes in so many seconds is sent whole: a cut costs no more than that."""
SINGLE_PUT_BYTES = 256 << 20
SLOWEST_BYTES_PER_S = 64_000
"""An uplink slower than this is taken for one that is stuck."""
SLOWEST_SERVER_BYTES_PER_S = 4_000_000
"""What a server does at least with the bytes that it has got."""
COMPLETE_S = 180.0
"""The server puts the parts of an upload together meanwhile."""
COMPLETE_ANSWER_S = 90.0
"""It may be silent for so long, twice: some are until they have done it, and stop if nobody waits."""
_RATE_SAMPLE_BYTES = 1 << 20
"""What is smaller takes as long as the server's answer does, and tells nothing about the uplink."""


def part_bytes(size_bytes: int) -> int:
    """All parts but the last are equally large, and S3 takes 10,000 of them."""
    return max(PART_BYTES, -(-size_bytes // MOST_PARTS))


def parts_at_once(rate: float | None) -> int:
    """How many parts to have under way on an uplink of so many bytes per second; None if nobody knows yet."""
    if rate is None or rate < PART_BYTES / 1.0:
        return 1
    return 2 if rate < PART_BYTES / 0.25 else PARTS_AT_ONCE


def allowance_s(size_bytes: int, rate: float | None) -> float:
    """How long a transfer may take before it counts as stuck, beside what any request may take."""
    return size_bytes / max(SLOWEST_BYTES_PER_S, (rate or 0.0) / 10)


def answer_s(size_bytes: int) -> float:
    """How long a server may say nothing about a body that it has: some hand it on, or hash it, first."""
    return IDLE_S + size_bytes / SLOWEST_SERVER_BYTES_PER_S


def sent_whole(size_bytes: int, rate: float | None) -> bool:
    """Whether a file goes by a single request."""
    by_rate = SINGLE_PUT_S * rate if rate else 0.0
    return size_bytes <= min(SINGLE_PUT_BYTES, max(PART_BYTES, by_rate))


class Uplink:
    """What the way to the store has lately carried: a moving average, which a stuck transfer resets."""

    def __init__(self) -> None:
        self._rate: float | None = None
        self._lock = threading.Lock()

    @property
    def bytes_per_s(self) -> float | None:
        return self._rate

    def carried(self, size_bytes: int, seconds: float, at_once: int = 1) -> None:
        """Note a transfer that went well beside as many alike as were under way."""
        if size_bytes >= _RATE_SAMPLE_BYTES and seconds > 0:
            seen = size_bytes * at_once / seconds
            with self._lock:
                self._rate = seen if self._rate is None else 0.7 * self._rate + 0.3 * seen

    def stuck(self) -> None:
        """Forget the rate: the next one has all the time in the world to show another."""
        with self._lock:
            self._rate = None
