"""A run's log as whoever works on the run uses it: read it, append to it.

``Log`` is one, over the store itself. A process that may not append, or not even list the store, holds one
that asks the controller instead.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from .log import RunLog
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


def append_decided(log: RunLog, records: Iterable[Record]) -> Iterator[Record]:
    """Append records that were decided together on the log's state, yielding each that now is in the log.

    If somebody else's record comes before any of them, it and what is left were decided on another state, in
    which the run was not complete, say: they are not appended, and whoever looks next decides anew.

    Raises:
        StorageError: See ``Log.append``.
    """
    seq = log.next_seq
    for record in records:
        if not log.append_as(seq, record):
            return
        yield record
        seq = log.next_seq


def append_until_said(log: RunLog, decide: Callable[[RunState], Iterable[Record]]) -> Iterator[Record]:
    """Append what is decided on a run's present state, anew as often as somebody else's record comes between.

    Args:
        decide: Returns what there is to say in a state; nothing once it has been said.

    Raises:
        StorageError: See ``Log.append``.
    """
    while records := tuple(decide(log.refresh())):
        yield from append_decided(log, records)
