"""What ``orchestrate supervise`` does next, by how its child, ``orchestrate resume``, ended: pure functions.

exit 0, 100  the sweep is over            -> end with that code
exit 2, 4    no retry can help            -> end with that code
anything else                             -> again, after a pause that doubles with each failure in a row
"""

from dataclasses import dataclass

OVER = (0, 100)
HOPELESS = (2, 4)

EXIT_TAKEN_OVER = 8
"""A controller of another cluster has taken over the sweep: two that take it from each other help nobody."""

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0

STEADY_S = 120.0
"""A child that worked for so long begins a new count of failures when it ends."""

EXIT_NO_ANSWER = 7
"""The cluster, or the controller on it, is there and does not answer: what a new head may mend."""

EXIT_PREFLIGHT = 3
PREFLIGHT_FAILURES = 4
"""Workers that have yet to join a new head are waited for in short pauses: runs could be training."""

HEAD_SUSPECT = 3
"""After so many of these among failures in a row the head is started anew, if it is ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tries:
    """Failures in a row, of the child or of the head."""

    failures: int = 0
    suspicious: int = 0
    """Those of them that were no answer."""

    @property
    def pause_s(self) -> float:
        """How long to wait before the next try."""
        if not self.failures:
            return 0.0
        return min(FIRST_PAUSE_S * 2.0 ** min(self.failures - 1, 64), LONGEST_PAUSE_S)

    @property
    def head_is_suspect(self) -> bool:
        return self.suspicious >= HEAD_SUSPECT


def final(code: int) -> int | None:
    """Return what the supervisor exits with because its child exited with ``code``; None: it goes on."""
    return code if code in OVER or code in HOPELESS else None


def failed(tries: Tries, code: int | None, lasted_s: float) -> Tries:
    """Return the count after a child that exited with ``code``, or after a head that did not start (None)."""
    silent = code == EXIT_NO_ANSWER
    if lasted_s >= STEADY_S and not silent:  # which takes its time to find that out
        tries = Tries()
    # Nothing else: a new head ends all that trains, and helps neither with the store, nor with workers that
    # have yet to join, nor with a mistake of this program's. If Ray ended the child, the next one tells.
    more = code != EXIT_PREFLIGHT or tries.failures < PREFLIGHT_FAILURES
    return Tries(failures=tries.failures + more, suspicious=tries.suspicious + silent)
