"""Making slots do what the logs say: a lost order is repeated, and what is to end is asked to.

A slot needs a moment to do what it is told and to say so, and is not told the same again before that. An
order is repeated only when the log was read in the same tick: another controller may have ended the attempt,
and the slot may hold what came after it.
"""

from collections.abc import Mapping

from storage.records import Claimed

from .cluster import Cluster, Health, Order, Slot
from .draining import DrainBook
from .tracked_run import TrackedRun

AGAIN_S = 2.0

_Telling = tuple[str, str, str, int, float]
"""The slot, the verb, the run, its attempt, and what else was said."""


class Steering:
    """Tells the slots of one sweep what to do."""

    def __init__(self, cluster: Cluster, drains: DrainBook, stop_grace_s: float) -> None:
        self._cluster = cluster
        self._drains = drains
        self._stop_grace_s = stop_grace_s
        self._told: dict[_Telling, float] = {}

    def order(self, run_id: str, claimed: Claimed, now: float) -> None:
        """Tell a slot to train what a claim gave to it."""
        if self._tell(_ordering(run_id, claimed), now):
            order = Order(run_id=run_id, attempt=claimed.attempt, incarnation=claimed.incarnation)
            self._cluster.start(claimed.slot, order)

    def awaits_order(self, run: TrackedRun, slots: Mapping[str, Slot], now: float) -> bool:
        """Whether an order is to be repeated, and so the log to be read."""
        claimed = run.state.running.claimed if run.state.running else None
        slot = slots.get(claimed.slot) if claimed else None
        if claimed is None or slot is None or slot.health is not Health.ALIVE or _trains(slot, run, claimed):
            return False
        return not self._told_lately(_ordering(run.plan.run_id, claimed), now)

    def steer(self, run: TrackedRun, slot: Slot | None, now: float) -> None:
        """Repeat a lost order, or ask an attempt to end that is cancelled, or whose node is drained."""
        running = run.state.running
        if running is None or slot is None or slot.health is not Health.ALIVE:
            return
        claimed, run_id = running.claimed, run.plan.run_id
        if not _trains(slot, run, claimed):
            if run.read_at >= now:
                self.order(run_id, claimed, now)
        elif run.state.cancel_requested:
            self._stop(slot, run_id, claimed.attempt, self._stop_grace_s, now)
        elif drain := self._drains.of(slot.node):
            self._stop(slot, run_id, claimed.attempt, drain.grace_s, now)

    def dismiss_ghosts(self, runs: Mapping[str, TrackedRun], slots: Mapping[str, Slot], now: float) -> None:
        """End attempts that are over by their logs: their next commit would end them, but is far away."""
        for slot in slots.values():
            work = slot.work
            run = runs.get(work.run_id) if work else None
            if work is None or run is None or work.exit_code is not None or slot.health is not Health.ALIVE:
                continue
            state = run.state
            current = state.running and state.running.number == work.attempt
            if run.damage:  # what it trains could never be committed
                self._stop(slot, work.run_id, work.attempt, self._stop_grace_s, now)
            elif work.attempt <= state.attempt and not current:
                self._stop(slot, work.run_id, work.attempt, 0.0, now)

    def forget(self, now: float) -> None:
        """Drop what may be said again."""
        self._told = {told: at for told, at in self._told.items() if now - at < AGAIN_S}

    def _stop(self, slot: Slot, run_id: str, attempt: int, grace_s: float, now: float) -> None:
        if self._tell((slot.slot, "stop", run_id, attempt, grace_s), now):
            self._cluster.stop(slot.slot, run_id, attempt, grace_s)

    def _tell(self, telling: _Telling, now: float) -> bool:
        if self._told_lately(telling, now):
            return False
        self._told[telling] = now
        return True

    def _told_lately(self, telling: _Telling, now: float) -> bool:
        return now - self._told.get(telling, float("-inf")) < AGAIN_S


def _ordering(run_id: str, claimed: Claimed) -> _Telling:
    return claimed.slot, "start", run_id, claimed.attempt, 0.0


def _trains(slot: Slot, run: TrackedRun, claimed: Claimed) -> bool:
    """Whether the slot holds the attempt, running or ended."""
    work = slot.work
    return work is not None and (work.run_id, work.attempt) == (run.plan.run_id, claimed.attempt)
