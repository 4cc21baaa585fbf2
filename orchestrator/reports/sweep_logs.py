"""The logs of all runs of a sweep, as commands read them: at once, and from the sweep's snapshot on.

What the snapshot says of a run that is over is believed without looking: nothing that a person is shown
changes after that.
"""

import contextlib
import itertools
from concurrent.futures import ThreadPoolExecutor

from storage.errors import Corrupt, StorageError, Unavailable
from storage.log import READERS, RunLog, run_log
from storage.object_store import ObjectStore
from storage.run_state import RunState
from storage.snapshots import read_sweep

from ..grid.sweep import Sweep

THREADS = 16
LOOKS_AT_ONCE = 64
"""Logs that one more look reads: each is a listing, which costs as much as a write, and looks are many."""


class SweepLogs:
    """Reads logs again and again, each time only what is new."""

    def __init__(self, sweep: Sweep, store: ObjectStore) -> None:
        self._sweep = sweep
        self._store = store
        readers = 1 if len(sweep.runs) >= THREADS else READERS
        self._logs: dict[str, RunLog] = {
            run.run_id: run_log(store, run.run_id, readers=readers, remember=False) for run in sweep.runs
        }
        self._looks = itertools.count(1)
        self._looked = dict.fromkeys(self._logs, 0)
        self._damaged: dict[str, str] = {}

    @property
    def states(self) -> dict[str, RunState]:
        """The last known state of each run, in sweep order."""
        return {run_id: log.state for run_id, log in self._logs.items()}

    @property
    def damaged(self) -> dict[str, str]:
        """Runs whose log is damaged, and how. Their states are those before the damage."""
        return dict(self._damaged)

    def read(self) -> None:
        """Read every log that may say something new.

        Raises:
            Unavailable, AccessDenied
        """
        self._restore()
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(self._read_one, self._unfinished()))

    def look(self) -> None:
        """Read what was not read for longest; a store that does not answer leaves the last known states.

        The first look reads all.
        """
        first = not any(self._looked.values())
        if first:
            self._restore()
        unfinished = sorted(self._unfinished(), key=self._looked.__getitem__)
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(self._read_if_there, unfinished if first else unfinished[:LOOKS_AT_ONCE]))

    def _unfinished(self) -> list[str]:
        return [run_id for run_id, log in self._logs.items() if log.state.finished is None]

    def _restore(self) -> None:
        known = {}
        with contextlib.suppress(StorageError):  # it only saves time
            known = read_sweep(self._store, self._sweep.name)
        for run_id, log in self._logs.items():
            if one := known.get(run_id):
                log.adopt(one.snapshot)

    def _read_if_there(self, run_id: str) -> None:
        with contextlib.suppress(Unavailable):
            self._read_one(run_id)

    def _read_one(self, run_id: str) -> None:
        self._looked[run_id] = next(self._looks)
        try:
            self._logs[run_id].refresh()
        except Corrupt as error:
            self._damaged[run_id] = str(error)
        else:
            self._damaged.pop(run_id, None)
