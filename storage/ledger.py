"""A run's log as whoever works on the run uses it: read it, append to it.

``Log`` is one, over the store itself. A process that may not append, or not even list the store, holds one
that asks the controller instead.
"""

from typing import Protocol

from .records import Record
from .run_state import RunState


class Ledger(Protocol):
    """Reads and appends to one run's log."""

    def refresh(self) -> RunState:
        """Return the state as the log tells it now.

        Raises:
            AccessDenied, Corrupt, Unavailable: See ``Log.refresh``.
        """

    def append(self, record: Record) -> RunState:
        """Append a record, unless the log already holds it, and return the state after it.

        Raises:
            Fenced: The log does not admit the record (any more).
            Unavailable: It may have been written: append it again later.
            AccessDenied, Corrupt
        """
