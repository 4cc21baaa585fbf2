"""Which runs are placed where next, and why others wait: the decisions of ``placing``, ``reputation`` and
``scheduler`` over what a controller knows, and what was last decided, for those who ask.
"""

import logging
from collections.abc import Callable, Iterator, Mapping

from storage.errors import Fenced

from ..grid.sweep import Sweep
from .cluster import Health, Slot
from .draining import DrainBook
from .lifecycle import Phase, Policy, phase, wait_s
from .placing import Hold, Outlook, SlotNote, bar, claims, free_slots, note, outlook, queued_run
from .readers import Readers
from .reputation import NodeBook, Repute, barred
from .scheduler import Placement, QueuedRun, assign
from .tracked_run import TrackedRun

logger = logging.getLogger(__name__)


class Allocation:
    """Decides for one sweep; nothing here has an effect."""

    def __init__(
        self,
        sweep: Sweep,
        runs: Mapping[str, TrackedRun],
        drains: DrainBook,
        readers: Readers,
        policy: Policy,
        *,
        clock: Callable[[], float],
        monotonic: Callable[[], float],
    ) -> None:
        self._sweep = sweep
        self._runs = runs
        self._drains = drains
        self._readers = readers
        self._policy = policy
        self._clock = clock
        self._monotonic = monotonic
        self._book = NodeBook()
        self.ill: dict[str, Repute] = {}
        """The nodes in ill repute."""
        self.notes: tuple[SlotNote, ...] = ()
        """What was thought of each slot when runs were last placed, or might have been."""

    def read(self, run: TrackedRun) -> None:
        """Take in what is new in a run."""
        self._book.note(run.plan.run_id, run.state, self._clock(), self._monotonic())

    def place(self, slots: Mapping[str, Slot]) -> dict[str, Placement]:
        """Return what each run gets that is to be started now."""
        self.notes = self._noted(slots)
        free = free_slots(self.notes)
        if not free or not self._drains.known:
            return {}
        queued = self._queued(untried=len(free))
        placed = assign(queued, free, self._monotonic(), room=self._room())
        return {placement.run_id: placement for placement in placed}

    def outlook(self, run_id: str) -> Outlook:
        """Why a run waits, by what was last decided.

        Raises:
            Fenced: It is not a run of this sweep.
        """
        run, notes = self._runs.get(run_id), self.notes
        if run is None:
            raise Fenced(f"{run_id} is not a run of sweep {self._sweep.name}")
        if run.damage:
            return Outlook(hold=Hold.LOG_DAMAGED, problem=run.damage, slots=notes)
        if run.problem:
            return Outlook(hold=Hold.LOG_UNREADABLE, problem=run.problem, slots=notes)
        if phase(run.state) is not Phase.QUEUED or run.state.cancel_requested or run.state.result:
            return Outlook(slots=notes)
        return outlook(
            queued_run(run_id, run.plan.index, run.state, self._not_before(run)),
            self._queued(),
            notes,
            drains_known=self._drains.known,
            room=self._room(),
            now=self._monotonic(),
        )

    def judge(self, slots: Mapping[str, Slot]) -> None:
        """Find out which nodes fail their runs."""
        now = self._monotonic()
        for lifted in self._drains.state.lifted:
            self._book.pardon(lifted.node, now - max(0.0, self._clock() - lifted.at))
        ill = self._book.judged({s.node for s in slots.values() if s.health is not Health.GONE}, now)
        for node, repute in ill.items():
            if node not in self.ill or self.ill[node].strikes < repute.strikes:
                logger.warning("%s is quarantined for %.0f s: %s", node, repute.until - now, repute.because)
        self.ill = ill

    def _awake(self) -> Iterator[TrackedRun]:
        return (run for run in self._runs.values() if run.awake)

    def _room(self) -> int | None:
        """How many runs may be started. There may be more slots than that: one whose node was told of its end
        is made up for at once, and may be used again."""
        limit = self._sweep.resources.max_concurrent
        if limit is None:
            return None
        running = sum(run.state.running is not None and not run.damage for run in self._awake())
        return max(0, limit - running)

    def _noted(self, slots: Mapping[str, Slot]) -> tuple[SlotNote, ...]:
        """What is thought of each slot, and why."""
        taken = claims({run.plan.run_id: run.state for run in self._awake() if not run.damage})
        self.judge(slots)
        may_try = [
            (slot.slot, slot.node)
            for slot in slots.values()
            if self.ill
            and slot.health is not Health.GONE
            and (slot.slot in taken or (slot.free and not bar(slot, self._drains.state)))
        ]
        ill = barred(may_try, taken, self.ill, self._monotonic())
        return tuple(
            note(slot, bar(slot, self._drains.state, ill), taken.get(slot.slot)) for slot in slots.values()
        )

    def _queued(self, *, untried: int | None = None) -> list[QueuedRun]:
        """The runs that may be placed, once they are due.

        Args:
            untried: Of those that never had an attempt the first so many will do: one is as good as another.
        """
        queued = []
        for run in self._runs.values():
            if run.tidy or (untried == 0 and not run.state.attempts) or not self._may_be_placed(run):
                continue
            if untried is not None and not run.state.attempts:
                untried -= 1
            queued.append(queued_run(run.plan.run_id, run.plan.index, run.state, self._not_before(run)))
        return queued

    def _may_be_placed(self, run: TrackedRun) -> bool:
        return (
            phase(run.state) is Phase.QUEUED
            and not run.state.cancel_requested
            and run.state.result is None
            and run.problem is None  # its state may be anything, and another run can use the slot
            and not self._readers.busy(run.plan.run_id)
        )

    def _not_before(self, run: TrackedRun) -> float:
        """When the run may be launched again. Of its last attempt's end only the age is believed, and only
        when that is first seen: whoever wrote it, and this machine later, may have a clock that is wrong."""
        last = run.state.attempts[-1] if run.state.attempts else None
        if last is None or last.ended is None:
            return float("-inf")
        if run.end_seen != last.number:
            run.end_seen = last.number
            run.ended_at = self._monotonic() - max(0.0, self._clock() - last.ended.at)
        return run.ended_at + wait_s(run.state, self._policy)
