"""Finds out that an attempt is superseded although it commits nothing: it looks at the log now and then.

The next commit of an attempt that is not the newest would be refused, but one whose steps are long, or that
hangs, may never make another, and would hold its slot and its GPU for nothing.
"""

import threading
import time
from collections.abc import Callable

from storage.errors import Fenced, StorageError
from storage.ledger import Ledger
from storage.run_state import RunState

LOOK_S = 30.0
"""One request this often, and none while commits prove the same."""


def superseded(state: RunState, run_id: str, attempt: int, incarnation: str) -> Fenced | None:
    """Return what ends the attempt if it may not run, or not any more."""
    running = state.running.claimed if state.running else None
    if running and (running.attempt, running.incarnation) == (attempt, incarnation):
        return None
    return Fenced(f"{run_id}: attempt {attempt} is over, or was never claimed")


class ClaimWatch:
    """A thread that calls ``on_fenced``, once, when the run's log knows a newer claim or the run's end."""

    def __init__(
        self,
        ledger: Ledger,
        run_id: str,
        attempt: int,
        incarnation: str,
        on_fenced: Callable[[Fenced], None],
        *,
        every_s: float | None = None,
    ) -> None:
        self._ledger = ledger
        self._claim = (run_id, attempt, incarnation)
        self._on_fenced = on_fenced
        self._every_s = LOOK_S if every_s is None else every_s
        self._over = threading.Event()
        self._valid_at = time.monotonic()

    def start(self) -> None:
        """Begin to look. The thread may hang in the store: nobody waits for it."""
        threading.Thread(target=self._watch, name="claim", daemon=True).start()

    def stop(self) -> None:
        """Look no more."""
        self._over.set()

    def valid(self) -> None:
        """The log has just admitted a record of the attempt."""
        self._valid_at = time.monotonic()

    def _watch(self) -> None:
        while not self._over.wait(max(0.0, self._valid_at + self._every_s - time.monotonic())):
            if time.monotonic() - self._valid_at < self._every_s:
                continue
            self.valid()
            if error := self._look():
                if not self._over.is_set():
                    self._on_fenced(error)
                return

    def _look(self) -> Fenced | None:
        try:
            return superseded(self._ledger.refresh(), *self._claim)
        except Fenced as error:
            return error
        except StorageError:
            return None  # the store may be away for hours; whoever commits has to do with that
