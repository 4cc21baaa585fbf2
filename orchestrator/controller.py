"""The controller's tick: observe, decide, append, act.

Decisions are ``lifecycle`` and ``scheduler``, truth is the logs, and every act may be repeated or lost: a
record is appended before what follows from it is done, and what a log says should be going on, but is not,
is started again by the next tick. So a controller may die between any two lines, and its successor, which
knows nothing but the store and the cluster, goes on.
"""

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from storage.checkpoints import CheckpointStore
from storage.errors import AccessDenied, Fenced, StorageError
from storage.log import RunLog, run_log
from storage.object_store import ObjectStore
from storage.records import CheckpointRef, Claimed, EndReason, Record
from storage.retention import plan_prune, plan_salvaged
from storage.run_state import FREE_ENDS, RunState

from .cluster import Cluster, Health, Order, Slot
from .lifecycle import CancelAsked, Event, Exited, Lost, Phase, Policy, advance, not_before, phase, settle
from .scheduler import FreeSlot, Placement, QueuedRun, assign
from .sweep import PlannedRun, Sweep
from .term import Term

REFRESH_S = 5.0
"""How often the log of a running run is read without a hint."""

IDLE_REFRESH_S = 60.0
"""The same for a run that nobody else should be writing about."""

RETRY_S = 5.0
"""How long a run is left alone after the store failed it."""

NODE_AT_FAULT = (EndReason.STORAGE_DOWN, EndReason.DISK_FULL)
"""Whatever the run has achieved there: what the next attempt needs may not be better there soon."""

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Run:
    """A run's plan, its log, and when the controller last looked."""

    plan: PlannedRun
    log: RunLog
    checkpoints: CheckpointStore
    lock: threading.RLock = field(default_factory=threading.RLock)
    read_at: float = float("-inf")
    problem: str | None = None
    """Why the store could not be used for this run, until it can."""
    retry_at: float = float("-inf")
    clean_at: float = float("-inf")
    tidy: bool = False
    """Finished, and what it left behind is deleted, as far as the store allows."""

    @property
    def state(self) -> RunState:
        return self.log.state


class Controller:
    """One sweep's controller. ``tick`` is called by one thread; ``append`` and ``cancel`` by any."""

    def __init__(
        self,
        sweep: Sweep,
        store: ObjectStore,
        cluster: Cluster,
        clock: Callable[[], float] = time.time,
        term: Term | None = None,
    ) -> None:
        """``term``: None where no other controller can be."""
        self._sweep = sweep
        self._cluster = cluster
        self._clock = clock
        self._term = term
        self._term_checked_at = clock()
        self._policy = Policy(
            max_failures=sweep.recovery.max_failures,
            backoff_s=sweep.recovery.backoff_s,
            max_backoff_s=sweep.recovery.max_backoff_s,
        )
        self._runs: dict[str, _Run] = {}
        for plan in sweep.runs:
            log = run_log(store, plan.run_id)
            self._runs[plan.run_id] = _Run(plan, log, CheckpointStore(store, plan.run_id, log))

    @property
    def states(self) -> dict[str, RunState]:
        """The last known state of each run, in sweep order."""
        return {run_id: run.state for run_id, run in self._runs.items()}

    @property
    def done(self) -> bool:
        """Every run is over, and nothing that it left behind is in the store."""
        return all(run.tidy for run in self._runs.values())

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
            run.log.refresh()
            run.log.append(record)

    def cancel(self, run_ids: Iterable[str]) -> None:
        """Ask runs to stop. Those that are over stay as they are."""
        for run_id in run_ids:
            run = self._runs[run_id]
            with run.lock:
                run.log.refresh()
                self._advance(run, CancelAsked(at=self._clock()))

    def tick(self) -> None:
        """Look at everything once and do what is due. A store that fails delays a run, never ends it.

        Raises:
            SteppedDown: Another controller has taken over.
        """
        if self._clock() - self._term_checked_at >= REFRESH_S:
            with contextlib.suppress(StorageError):
                self._check_term()
        slots = {slot.slot: slot for slot in self._cluster.observe()}
        for run in self._runs.values():
            with self._guarded(run):
                self._follow(run, slots)
        self._dismiss_ghosts(slots)
        self._launch(slots)

    def _check_term(self) -> None:
        if self._term:
            self._term.check()
        self._term_checked_at = self._clock()

    def _follow(self, run: _Run, slots: dict[str, Slot]) -> None:
        """Bring one run up to date with its log and its slot."""
        now = self._clock()
        if run.tidy or now < run.retry_at:
            return
        event = self._event(run, slots)
        if event or run.problem or now - run.read_at >= (REFRESH_S if run.state.running else IDLE_REFRESH_S):
            run.log.refresh()
            run.read_at, run.problem = now, None
            event = self._event(run, slots)
        if event:
            self._advance(run, event)
        self._append_all(run, settle(run.state, now))
        if running := run.state.running:
            self._steer(run, slots.get(running.claimed.slot))
        if now >= run.clean_at:
            self._clean(run, now)

    def _event(self, run: _Run, slots: dict[str, Slot]) -> Event | None:
        """Return what the slot's report means for the running attempt."""
        state = run.state
        if state.running is None:
            return None
        claimed, now = state.running.claimed, self._clock()
        slot = slots.get(claimed.slot)
        if slot is None:
            self._check_term()  # a slot that we never knew may be the newer controller's
            detail = f"{claimed.node} is not part of the cluster any more"
            return Lost(at=now, attempt=claimed.attempt, reason=EndReason.NODE_LOST, detail=detail)
        work = slot.work
        mine = work if work and (work.run_id, work.attempt) == (run.plan.run_id, claimed.attempt) else None
        if mine and mine.exit_code is not None:
            return Exited(
                at=now,
                attempt=claimed.attempt,
                code=mine.exit_code,
                error=mine.error,
                step=mine.step,
                step_s=mine.step_s,
            )
        reason = self._loss(slot)
        if reason is None:
            return None
        return Lost(
            at=now,
            attempt=claimed.attempt,
            reason=reason,
            detail=_loss_detail(reason, claimed.node, slot.silent_s),
            step=mine.step if mine else state.committed_step,
            step_s=mine.step_s if mine else 0.0,
            silent_s=slot.silent_s,
        )

    def _loss(self, slot: Slot) -> EndReason | None:
        if slot.health is Health.GONE:
            return EndReason.NODE_LOST if slot.node_lost else EndReason.AGENT_LOST
        if slot.health is Health.UNKNOWN and slot.silent_s > self._sweep.recovery.silence_s:
            return EndReason.NODE_UNREACHABLE
        return None

    def _steer(self, run: _Run, slot: Slot | None) -> None:
        """Make the slot do what the log says: repeat a lost order, or ask a cancelled run to stop."""
        running = run.state.running
        if running is None or slot is None or slot.health is not Health.ALIVE:
            return
        claimed = running.claimed
        if slot.work is None or (slot.work.run_id, slot.work.attempt) != (run.plan.run_id, claimed.attempt):
            if run.log.refresh().running != running:
                return  # another controller has ended the attempt: the slot may hold what came after it
            self._cluster.start(
                slot.slot,
                Order(run_id=run.plan.run_id, attempt=claimed.attempt, incarnation=claimed.incarnation),
            )
        elif run.state.cancel_requested:
            self._cluster.stop(slot.slot, run.plan.run_id, claimed.attempt, self._sweep.recovery.stop_grace_s)

    def _dismiss_ghosts(self, slots: dict[str, Slot]) -> None:
        """End attempts that are over by their logs: their next commit would end them, but is far away."""
        for slot in slots.values():
            work = slot.work
            run = self._runs.get(work.run_id) if work else None
            if work is None or run is None or work.exit_code is not None or slot.health is not Health.ALIVE:
                continue
            state = run.state
            current = state.running and state.running.number == work.attempt
            if work.attempt <= state.attempt and not current:
                self._cluster.stop(slot.slot, work.run_id, work.attempt, grace_s=0.0)

    def _launch(self, slots: dict[str, Slot]) -> None:
        queued = [
            QueuedRun(
                run_id=run.plan.run_id,
                index=run.plan.index,
                committed_step=run.state.committed_step,
                not_before=not_before(run.state, self._policy),
                avoid_node=_stalled_on(run.state),
            )
            for run in self._runs.values()
            if phase(run.state) is Phase.QUEUED
            and not run.state.cancel_requested
            and run.state.result is None
            and run.problem is None  # its state may be anything, and another run can use the slot
        ]
        taken = {run.state.running.claimed.slot for run in self._runs.values() if run.state.running}
        free = [
            FreeSlot(slot=s.slot, node=s.node, up_since=s.up_since)
            for s in slots.values()
            if s.free and s.slot not in taken
        ]
        for placement in assign(queued, free, self._clock()):
            run = self._runs[placement.run_id]
            with self._guarded(run):
                self._claim(run, placement)

    def _claim(self, run: _Run, placement: Placement) -> None:
        state = run.log.refresh()
        if phase(state) is not Phase.QUEUED or state.cancel_requested or state.result:
            return  # what it was placed by is old news
        claimed = Claimed(
            attempt=state.attempt + 1,
            incarnation=secrets.token_hex(4),
            node=placement.node,
            slot=placement.slot,
            at=self._clock(),
        )
        run.log.append(claimed)
        logger.info("%s: attempt %d on %s", run.plan.run_id, claimed.attempt, placement.node)
        self._cluster.start(
            placement.slot,
            Order(run_id=run.plan.run_id, attempt=claimed.attempt, incarnation=claimed.incarnation),
        )

    def _clean(self, run: _Run, now: float) -> None:
        """Delete what is of no use any more. What may not be deleted stays, and costs nothing but space."""
        over = run.state.finished is not None
        try:
            self._prune(run, grace_s=0.0 if over else self._sweep.checkpoint.grace_s)
            if over:
                run.checkpoints.sweep_orphans(run.state)
        except AccessDenied as error:
            if run.clean_at == float("-inf"):
                logger.warning("%s: nothing can be deleted: %s", run.plan.run_id, error)
            run.clean_at = now + IDLE_REFRESH_S
        run.tidy = over

    def _prune(self, run: _Run, grace_s: float) -> None:
        """Retire what policy does not keep, and delete what was retired long enough ago."""
        state, policy = run.state, self._sweep.checkpoint
        pinned = (*_pinned(state), *state.pinned)
        superfluous = plan_prune(
            state.checkpoints,
            keep_last=policy.keep_last,
            keep_every=policy.keep_every,
            keep_best=policy.keep_best,
            metric=self._sweep.metric.name if self._sweep.metric else None,
            goal=self._sweep.metric.goal if self._sweep.metric else "minimize",
            pinned=pinned,
        )
        superfluous += plan_salvaged(state)
        if superfluous:
            run.checkpoints.retire(superfluous)
        if run.state.retired:
            run.checkpoints.reap(run.state, grace_s=grace_s)

    def _advance(self, run: _Run, event: Event) -> None:
        self._append_all(run, advance(run.state, event, self._policy))

    def _append_all(self, run: _Run, records: tuple[Record, ...]) -> None:
        for record in records:
            run.log.append(record)
            logger.info("%s: %s", run.plan.run_id, record)

    @contextlib.contextmanager
    def _guarded(self, run: _Run) -> Iterator[None]:
        """Hold the run's lock. A store that fails, or a lost race, costs this run alone one tick."""
        with run.lock:
            try:
                yield
            except Fenced as error:
                logger.warning("%s: %s; reading its log again", run.plan.run_id, error)
                run.read_at = float("-inf")
            except StorageError as error:
                problem = f"{type(error).__name__}: {error}"
                if problem != run.problem:  # told once: the store may be away for hours
                    logger.warning("%s: %s; trying again", run.plan.run_id, problem)
                run.problem, run.retry_at = problem, self._clock() + RETRY_S


def _pinned(state: RunState) -> tuple[CheckpointRef, ...]:
    """What the live attempt resumes from may still be read until it has made its first step."""
    running = state.running
    if running is None or running.started:
        return ()
    return tuple(c.ref for c in state.checkpoints if c.step == running.resumed_from)


def _stalled_on(state: RunState) -> str | None:
    """The node to avoid: there the last attempt made no progress, could not reach the store, or had no room."""
    if not state.attempts:
        return None
    last = state.attempts[-1]
    reason = last.ended.reason if last.ended else None
    stalled = reason is not None and reason not in FREE_ENDS and last.committed_step is None
    return last.claimed.node if stalled or reason in NODE_AT_FAULT else None


def _loss_detail(reason: EndReason, node: str, silent_s: float) -> str:
    match reason:
        case EndReason.NODE_LOST:
            return f"{node} was lost without notice"
        case EndReason.AGENT_LOST:
            return f"the agent on {node} died"
        case _:
            return f"{node} did not answer for {silent_s:.0f} s"
