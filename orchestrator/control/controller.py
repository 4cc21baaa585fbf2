"""The controller's tick: observe, decide, append, act.

Decisions are ``lifecycle`` and ``scheduler``, truth is the logs, and every act may be repeated or lost: a
record is appended before what follows from it is done, and what a log says should be going on, but is not,
is started again by the next tick. So a controller may die between any two lines, and its successor, which
knows nothing but the store and the cluster, goes on.

One thread decides and appends; logs are read, and left-overs deleted, by ``Readers``, so that a run whose
part of the store is slow holds up no other. What a tick costs in requests: one listing for each running run
that is due (``REFRESH_S``, at most ``LOOKS_PER_S`` in all), one now and then for others (``IDLE_REFRESH_S``,
``IDLE_LOOKS_PER_S``), one per ``REFRESH_S`` for the term; none for runs that are over, and none in between.
A start costs two requests for the sweep's snapshot, and one listing for each run that is not over and tidy.
"""

import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Iterable
from functools import partial

from storage.errors import (
    Fenced,
    StorageError,
)
from storage.ledger import append_decided, append_until_said
from storage.object_store import ObjectStore
from storage.records import (
    Claimed,
    Record,
)
from storage.run_state import RunState

from ..grid.schema import Recovery
from ..grid.sweep import Sweep
from . import silence
from .allocation import Allocation
from .cluster import Cluster, Health, Slot
from .draining import DrainBook, drain_record
from .lifecycle import CancelAsked, Event, Phase, Policy, advance, phase, settle
from .news import news
from .placing import Outlook, SlotNote, unused
from .pruning import delete_orphans, prune
from .readers import PATIENCE_S, Readers
from .scheduler import Placement
from .steering import Steering
from .sweep_snapshot import SweepSnapshot
from .term import Term
from .tracked_run import TrackedRun
from .trouble import guarded

REFRESH_S = 5.0
"""How often the log of a running run is read without a hint."""

IDLE_REFRESH_S = 60.0
"""The same for a run that nobody else should be writing about."""

LOOKS_PER_S = 4.0
IDLE_LOOKS_PER_S = 1.0
"""With very many runs each is looked at less often: a listing costs as much as a write, day and night."""

LOOKS_AT_ONCE = 64
"""More than these that are merely due wait for the next tick, those not looked at for longest going first."""

START_PATIENCE_S = 10.0
"""At the start nothing is decided until every log is read, or none has been for so long."""

_TERM = "/term"
"""Among the readers' names, which are otherwise those of runs."""

logger = logging.getLogger(__name__)


def policy_of(recovery: Recovery) -> Policy:
    """How patient a sweep's file wants its controller to be."""
    return Policy(
        max_failures=recovery.max_failures,
        backoff_s=recovery.backoff_s,
        max_backoff_s=recovery.max_backoff_s,
    )


def _look_at(term: Term) -> None:
    with contextlib.suppress(StorageError):
        term.check()


class Controller:
    """One sweep's controller. ``tick`` is called by one thread; ``append`` and ``cancel`` by any."""

    def __init__(
        self,
        sweep: Sweep,
        store: ObjectStore,
        cluster: Cluster,
        clock: Callable[[], float] | None = None,
        term: Term | None = None,
        *,
        monotonic: Callable[[], float] | None = None,
        sleep: Callable[[float], None] = time.sleep,
        readers: Readers | None = None,
    ) -> None:
        """Clocks are this machine's; a ``clock`` that is given without the other is taken for both.

        Args:
            clock: Unix seconds for the records. It may be set at any time: nothing waits by it.
            term: None where no other controller can be.
            monotonic: Seconds, for every wait.
            sleep: Waits before a store that did not answer is asked again.
            readers: None: threads of its own.
        """
        self._sweep = sweep
        self._cluster = cluster
        self._clock = clock or time.time
        self._monotonic = monotonic or clock or time.monotonic
        self._term = term
        self._term_checked_at = self._monotonic()
        self._policy = policy_of(sweep.recovery)
        self._readers = readers or Readers()
        track = partial(
            TrackedRun.of,
            store=store,
            many=len(sweep.runs) >= self._readers.threads,
            clock=self._clock,
            monotonic=self._monotonic,
            sleep=sleep,
        )
        self._runs = {plan.run_id: track(plan) for plan in sweep.runs}
        runs = tuple(self._runs.values())
        self._snapshot = SweepSnapshot(store, sweep.name, runs, self._readers, self._monotonic)
        self._drains = DrainBook(store, sweep.name, self._readers, self._monotonic)
        self._steering = Steering(cluster, self._drains, sweep.recovery.stop_grace_s)
        self._allocation = Allocation(
            sweep,
            self._runs,
            self._drains,
            self._readers,
            self._policy,
            clock=self._clock,
            monotonic=self._monotonic,
        )
        self._begun = False

    @property
    def states(self) -> dict[str, RunState]:
        """The last known state of each run, in sweep order."""
        return {run_id: run.state for run_id, run in self._runs.items()}

    @property
    def done(self) -> bool:
        """Every run is over, and nothing that it left behind is in the store; or its log is damaged."""
        return all(run.tidy or run.damage for run in self._runs.values())

    @property
    def begun(self) -> bool:
        """What the logs say is known."""
        return self._begun

    @property
    def damaged(self) -> dict[str, str]:
        """Runs that nobody can go on with, and why."""
        return {run_id: run.damage for run_id, run in self._runs.items() if run.damage}

    def state(self, run_id: str, *, refresh: bool = False) -> RunState:
        """The state of a run as last known, or as its log tells it now.

        Raises:
            Fenced: It is not a run of this sweep.
        """
        run = self._runs.get(run_id)
        if run is None:
            raise Fenced(f"{run_id} is not a run of sweep {self._sweep.name}")
        if refresh:
            with run.lock:
                run.quiet = False
                run.log.refresh()
        return run.state

    def append(self, run_id: str, record: Record) -> None:
        """Append for an agent that may not do so itself. A record that is there already is not repeated.

        Raises:
            Fenced: The log does not admit the record.
        """
        run = self._runs.get(run_id)
        if run is None:
            raise Fenced(f"{run_id} is not a run of sweep {self._sweep.name}")
        with run.lock:
            run.quiet = False
            run.log.refresh()
            run.log.append(record)

    def cancel(self, run_ids: Iterable[str]) -> None:
        """Ask runs to stop. Those that are over stay as they are.

        Raises:
            StorageError: One of them could not be asked; all others were.
        """
        runs = [run for run_id in run_ids if not (run := self._runs[run_id]).tidy and not run.damage]
        with self._readers.pool() as pool:
            failed = [error for error in pool.map(self._cancel, runs) if error]
        if failed:
            raise failed[0]

    def drain(self, node: str, grace_s: float | None) -> None:
        """Leave a node alone: nothing new goes there, and what trains there gets ``grace_s`` to save itself
        and end. None: the node may be used again.

        Raises:
            StorageError
        """
        self._drains.record(drain_record(node, grace_s, self._clock()))

    def notes(self) -> tuple[SlotNote, ...]:
        """What was thought of each slot when runs were last placed, or might have been."""
        return self._allocation.notes

    def unused(self) -> frozenset[str]:
        """The slots in whose place the cluster may open others."""
        return unused(self._allocation.notes)

    def outlook(self, run_id: str) -> Outlook:
        """Why a run waits, by what was last decided.

        Raises:
            Fenced: It is not a run of this sweep.
        """
        return self._allocation.outlook(run_id)

    def _cancel(self, run: TrackedRun) -> StorageError | None:
        try:
            with run.lock:
                run.quiet = False
                asked = CancelAsked(at=self._clock())
                for record in append_until_said(
                    run.log, lambda state: advance(state, asked, self._policy, self._allocation.ill)
                ):
                    logger.info("%s: %s", run.plan.run_id, record)
        except StorageError as error:
            return error
        return None

    def tick(self) -> None:
        """Look at everything once and do what is due. A store that fails delays a run, never ends it.

        Raises:
            SteppedDown: Another controller has taken over.
        """
        self._tend_term()
        if not self._begun and not self._begin():
            return
        slots = {slot.slot: slot for slot in self._cluster.observe()}
        self._allocation.judge(slots)  # before any end is: what happens on a bad node proves nothing
        now = self._monotonic()
        due = self._due(slots, now)
        read = self._read(due)
        for run in self._awake():
            run_id = run.plan.run_id
            if run_id in read or (run_id not in due and self._free(run, now)):
                self._try(run, partial(self._follow, run, slots, now))
        self._sweep_orphans(now)
        if any(run.quiet or run.state.finished is None for run in self._runs.values()):
            self._drains.tend(now)
        self._steering.dismiss_ghosts(self._runs, slots, now)
        self._steering.forget(now)
        self._launch(slots)
        self._snapshot.keep(now, at_once=self.done)

    def _begin(self) -> bool:
        """Read every log, from the last snapshot on; False if not even that can be asked for yet."""
        if not self._snapshot.restore():
            return False
        self._read([run_id for run_id, run in self._runs.items() if not run.tidy], START_PATIENCE_S)
        for run in self._runs.values():
            run.was_over = run.state.finished is not None
            self._allocation.read(run)
        self._begun = True
        return True

    def _due(self, slots: dict[str, Slot], now: float) -> dict[str, None]:
        """The runs whose logs are to be read now: something has happened, or it has been a while.

        In an order that does not depend on how strings hash: what a simulation did, it must do again.
        """
        awake = [run for run in self._awake() if self._free(run, now)]
        quiet = [run for run in self._runs.values() if run.quiet and not run.tidy]
        running = sum(run.state.running is not None for run in awake)
        every_s = max(REFRESH_S, running / LOOKS_PER_S)
        idle_every_s = max(IDLE_REFRESH_S, (len(awake) + len(quiet) - running) / IDLE_LOOKS_PER_S)
        looks = [
            (run.read_at, run.plan.run_id)
            for run in quiet
            if now - run.read_at >= idle_every_s and self._free(run, now)
        ]
        due = dict[str, None]()
        for run in awake:
            if run.problem or self._event(run, slots, now) or self._steering.awaits_order(run, slots, now):
                due[run.plan.run_id] = None
            elif now - run.read_at >= self._every_s(run, slots, every_s, idle_every_s):
                looks.append((run.read_at, run.plan.run_id))
        return due | dict.fromkeys(run_id for _, run_id in sorted(looks)[:LOOKS_AT_ONCE])

    def _every_s(self, run: TrackedRun, slots: dict[str, Slot], running_s: float, idle_s: float) -> float:
        """How often the run's log is read: where the slot is silent, it alone can say that the run lives."""
        if run.state.running is None:
            return idle_s
        slot = slots.get(run.state.running.claimed.slot)
        return REFRESH_S if slot and slot.health is Health.UNKNOWN else running_s

    def _awake(self) -> list[TrackedRun]:
        """The runs about which there may be something to do. All others cost a tick no more than this loop:
        there may be very many."""
        return [run for run in self._runs.values() if run.awake]

    def _free(self, run: TrackedRun, now: float) -> bool:
        """Whether there may be something to do about the run, and nobody is at it."""
        return not run.tidy and now >= run.retry_at and not self._readers.busy(run.plan.run_id)

    def _read(self, run_ids: Iterable[str], patience_s: float = PATIENCE_S) -> set[str]:
        """Read the logs of these runs at once; returns those whose logs are now known as of this call."""
        done = self._readers.do(
            {run_id: partial(self._read_one, self._runs[run_id]) for run_id in run_ids}, patience_s
        )
        return {run_id for run_id in done if self._runs[run_id].problem is None}

    def _read_one(self, run: TrackedRun) -> None:
        with run.lock, guarded(run, self._monotonic):
            now = self._monotonic()
            run.log.refresh()
            run.sign = silence.look(run.sign, run.state, now)
            run.read_at, run.problem, run.corrupt, run.damage = now, None, 0, None
            run.quiet = False

    def _tend_term(self) -> None:
        """Look now and then whether we are still in office, in the background: the store may hang."""
        due = self._monotonic() - self._term_checked_at >= REFRESH_S
        if self._term and due and not self._readers.busy(_TERM):
            self._term_checked_at = self._monotonic()
            self._readers.do({_TERM: partial(_look_at, self._term)})

    def _check_term(self) -> None:
        if self._term:
            self._term.check()
        self._term_checked_at = self._monotonic()

    def _follow(self, run: TrackedRun, slots: dict[str, Slot], now: float) -> None:
        """Do what follows from a run's log and its slot."""
        if event := self._event(run, slots, now):
            if run.state.running and run.state.running.claimed.slot not in slots:
                self._check_term()  # a slot that we never knew may be the newer controller's
            self._advance(run, event)
        self._append_all(run, settle(run.state, self._clock()))
        self._allocation.read(run)
        if running := run.state.running:
            self._steering.steer(run, slots.get(running.claimed.slot), now)
        if now >= run.clean_at:
            prune(run, self._sweep, now)
        self._snapshot.keep_own(run)
        run.quiet = not (run.state.running or run.state.retired or run.state.finished)

    def _event(self, run: TrackedRun, slots: dict[str, Slot], now: float) -> Event | None:
        return news(
            run.plan.run_id,
            run.state,
            slots,
            run.sign,
            self._drains.state,
            self._sweep.recovery.silence_s,
            at=self._clock(),
            now=now,
        )

    def _launch(self, slots: dict[str, Slot]) -> None:
        placements = self._allocation.place(slots)
        read = self._read(placements)
        for run_id, placement in placements.items():
            if run_id in read:
                self._try(self._runs[run_id], partial(self._claim, self._runs[run_id], placement))

    def _claim(self, run: TrackedRun, placement: Placement) -> None:
        state = run.state
        if phase(state) is not Phase.QUEUED or state.cancel_requested or state.result:
            return  # what it was placed by is old news
        claimed = Claimed(
            attempt=state.attempt + 1,
            incarnation=secrets.token_hex(4),
            node=placement.node,
            slot=placement.slot,
            because=placement.because,
            at=self._clock(),
        )
        if not self._append_all(run, (claimed,)):
            return
        run.sign = silence.look(run.sign, run.state, self._monotonic())
        logger.info(
            "%s: attempt %d on %s: %s", run.plan.run_id, claimed.attempt, placement.node, placement.because
        )
        self._steering.order(run.plan.run_id, claimed, self._monotonic())

    def _sweep_orphans(self, now: float) -> None:
        """Delete what runs that are over have left behind; nothing is appended, so all at once."""
        self._readers.do(
            {
                run.plan.run_id: partial(self._sweep_one, run, now)
                for run in self._awake()
                if run.state.finished and self._free(run, now) and run.problem is None
            }
        )

    def _sweep_one(self, run: TrackedRun, now: float) -> None:
        with run.lock, guarded(run, self._monotonic):
            delete_orphans(run, now)

    def _advance(self, run: TrackedRun, event: Event) -> None:
        self._append_all(run, advance(run.state, event, self._policy, self._allocation.ill))

    def _append_all(self, run: TrackedRun, records: tuple[Record, ...]) -> bool:
        """Append what was decided on the run's state; False if something came between, and was read."""
        appended = 0
        for record in append_decided(run.log, records):
            appended += 1
            logger.info("%s: %s", run.plan.run_id, record)
        return appended == len(records)

    def _try(self, run: TrackedRun, do: Callable[[], None]) -> None:
        """Do this under the run's lock; nothing while somebody else is at the run."""
        if run.lock.acquire(blocking=False):
            try:
                with guarded(run, self._monotonic):
                    do()
            finally:
                run.lock.release()
