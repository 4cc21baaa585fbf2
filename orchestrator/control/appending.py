"""Who writes a command's record into a run's log: this process, or the sweep's controller for it.

Where create-only holds, anybody may append. Where it does not, two writers could both win a position, and
the log would be damaged: there only the controller does, and without one nobody.
"""

from collections.abc import Callable

from storage.errors import Fenced
from storage.ledger import Ledger
from storage.log import RunLog, run_log
from storage.object_store import ObjectStore
from storage.records import RECORD, Record
from storage.run_state import RunState

from .cluster import RemoteController


class ArbitratedLedger:
    """Reads a run's log, and asks the controller to append. Implements ``Ledger``.

    The controller recognises a record that it has already written.
    """

    def __init__(self, log: RunLog, run_id: str, append: Callable[[str, bytes], str | None]) -> None:
        self._log = log
        self._run_id = run_id
        self._append = append

    def refresh(self) -> RunState:
        return self._log.refresh()

    def append(self, record: Record) -> RunState:
        refused = self._append(self._run_id, RECORD.dump_json(record))
        if refused is not None:
            raise Fenced(refused)
        return self._log.refresh()


def ledger_of(
    store: ObjectStore, run_id: str, controller: RemoteController | None, *, atomic: bool
) -> Ledger | None:
    """Return what this process may append through; None: nothing, only a controller may, and none is here."""
    if atomic:
        return run_log(store, run_id)
    return ArbitratedLedger(run_log(store, run_id), run_id, controller.append) if controller else None
