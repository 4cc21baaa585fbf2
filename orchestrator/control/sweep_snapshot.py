"""The snapshots that a controller leaves for its successor and for the nodes, see ``storage.snapshots``.

Writing one is never waited for, but at the end, and never repeated: the next is due soon, and without any a
start only takes longer.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from storage import snapshots
from storage.errors import StorageError, Unavailable
from storage.log import RunSnapshot
from storage.object_store import ObjectStore
from storage.run_state import UNHEARD_ENDS
from storage.snapshots import Known

from .readers import Readers
from .tracked_run import TrackedRun

EVERY_S = 300.0
"""How often the sweep's snapshot is written, if a log has grown."""

RETRY_S = 5.0
TRIES = 12
"""So often the last snapshot is asked for, if the store does not answer, before all logs are read instead."""

logger = logging.getLogger(__name__)


class SweepSnapshot:
    """Restores and keeps what is known of all runs. Used by the controller's thread."""

    def __init__(
        self,
        store: ObjectStore,
        sweep: str,
        runs: Sequence[TrackedRun],
        readers: Readers,
        monotonic: Callable[[], float],
    ) -> None:
        self._store = store
        self._sweep = sweep
        self._runs = runs
        self._readers = readers
        self._monotonic = monotonic
        self._tries = 0
        self._not_before = float("-inf")
        self._kept: list[tuple[int, bool]] = []
        self._trouble = ""

    def restore(self) -> bool:
        """Let the logs start from the last snapshot, if there is one; False: ask again in a later tick."""
        now = self._monotonic()
        if now < self._not_before:
            return False
        try:
            known = snapshots.read_sweep(self._store, self._sweep)
        except StorageError as error:
            self._tries += 1
            again = isinstance(error, Unavailable) and self._tries < TRIES
            then = "trying again" if again else "every log is read instead"
            self._tell(f"the sweep's snapshot cannot be read: {error}; {then}")
            if again:
                self._not_before = now + RETRY_S
                return False
            known = {}
        for run in self._runs:
            if one := known.get(run.plan.run_id):
                run.log.adopt(one.snapshot)
                run.tidy = one.tidy and one.snapshot.state.finished is not None
                run.own_snapshot_at = one.snapshot.next_seq
        self._kept = self._extent()
        self._not_before = now + EVERY_S
        return True

    def keep(self, now: float, *, at_once: bool) -> None:
        """Write the sweep's snapshot if it is due. ``at_once``: it is the last one, so it is waited for."""
        if not at_once and (now < self._not_before or self._readers.busy("snapshot")):
            return
        extent = self._extent()
        if extent == self._kept:
            return
        self._kept, self._not_before = extent, now + EVERY_S
        write = partial(self._write, self._known())
        if at_once:
            self._readers.do({"last snapshot": write}, None)
        else:
            self._readers.begin("snapshot", write)

    def keep_own(self, run: TrackedRun) -> None:
        """Write the run's own snapshot if its log has become that much longer."""
        read, run_id = run.log.snapshot(), run.plan.run_id
        if read is None or run.state.finished:
            return
        if read.next_seq // snapshots.LONG > run.own_snapshot_at // snapshots.LONG:
            run.own_snapshot_at = read.next_seq
            self._readers.begin(f"snapshot {run_id}", partial(self._write_own, run_id, read))

    def _extent(self) -> list[tuple[int, bool]]:
        """How much is known: where this is the same, nothing new would be written."""
        return [(run.log.next_seq, run.tidy) for run in self._runs]

    def _known(self) -> dict[str, Known]:
        return {
            run.plan.run_id: Known(snapshot=read, tidy=_surely_tidy(run))
            for run in self._runs
            if (read := run.log.snapshot())
        }

    def _write(self, known: Mapping[str, Known]) -> None:
        try:
            snapshots.write_sweep(self._store, self._sweep, known)
        except (StorageError, ValueError) as error:
            self._tell(f"the sweep's snapshot cannot be written, the next start takes longer: {error}")

    def _write_own(self, run_id: str, read: RunSnapshot) -> None:
        try:
            snapshots.write_run(self._store, run_id, read)
        except (StorageError, ValueError) as error:
            self._tell(f"a run's snapshot cannot be written, its next attempt starts later: {error}")

    def _tell(self, trouble: str) -> None:
        if trouble != self._trouble:
            self._trouble = trouble
            logger.warning("%s", trouble)


def _surely_tidy(run: TrackedRun) -> bool:
    """Whether no controller need ever look at the run again.

    Where an attempt may have lived on unseen, the next controller deletes once more what it left.
    """
    if not run.tidy or run.undeletable:
        return False
    # Such an attempt may live on somewhere, and upload what nobody will ever commit.
    ghosts = any(attempt.ended and attempt.ended.reason in UNHEARD_ENDS for attempt in run.state.attempts)
    return run.was_over or not ghosts
