"""What a controller knows of one run: its plan, its log, and how dealing with it went."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from storage.checkpoints import CheckpointStore
from storage.log import READERS, RunLog, run_log
from storage.object_store import ObjectStore
from storage.run_state import RunState

from ..grid.sweep import PlannedRun
from .silence import Sign

APPEND_PAUSES_S = (0.1,)
"""An append that fails is tried again soon, and then left to a later tick: other runs are waiting."""


@dataclass(slots=True)
class TrackedRun:
    """One run. Its lock is held by whoever deals with it."""

    plan: PlannedRun
    log: RunLog
    checkpoints: CheckpointStore
    lock: threading.RLock = field(default_factory=threading.RLock)
    read_at: float = float("-inf")
    """This and the other times here are by the controller's monotonic clock."""
    problem: str | None = None
    """Why the store could not be used for this run, until it can."""
    retry_at: float = float("-inf")
    corrupt: int = 0
    """How often in a row its log was found damaged."""
    damage: str | None = None
    """Nobody can go on with this run: its log is damaged, in this way."""
    quiet: bool = False
    """Nothing is to be done before its log says something new."""
    clean_at: float = float("-inf")
    undeletable: bool = False
    """The store does not let us delete."""
    tidy: bool = False
    """Finished, and what it left behind is deleted, as far as the store allows."""
    was_over: bool = False
    """The run was over when this controller began."""
    end_seen: int = 0
    """The attempt whose end was seen last, and at ``ended_at`` it was."""
    ended_at: float = float("-inf")
    sign: Sign | None = None
    """Of life, that the running attempt gave by what it wrote."""
    own_snapshot_at: int = 0
    """How long its log was when its own snapshot was last written."""

    @property
    def awake(self) -> bool:
        """There may be something to do about it."""
        return not self.quiet and not self.tidy

    @property
    def state(self) -> RunState:
        return self.log.state

    @classmethod
    def of(
        cls,
        plan: PlannedRun,
        store: ObjectStore,
        *,
        many: bool,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> "TrackedRun":
        """``many``: there are so many runs that the entries of each need not be read in parallel too."""
        log = run_log(
            store,
            plan.run_id,
            sleep=sleep,
            pauses_s=APPEND_PAUSES_S,
            readers=1 if many else READERS,
            remember=False,
        )
        checkpoints = CheckpointStore(store, plan.run_id, log, clock=clock, monotonic=monotonic)
        return cls(plan, log, checkpoints)
