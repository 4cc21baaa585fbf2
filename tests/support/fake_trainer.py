"""A trainer in virtual time, which commits to the real log of its run as real ones do, and its agent.

Training is a chain of hashes: the weights at a step follow from those at the step before, so a run that
resumed from anything but its own committed bytes ends in other bytes than ``weights_at(run_id, max_steps)``.
"""

import hashlib
from dataclasses import dataclass, field

from orchestrator.control.cluster import Order, Work
from orchestrator.notices.notice import Notice, Standing, told
from storage import layout
from storage.checkpoints import withdraw
from storage.errors import Corrupt, Fenced, Unavailable
from storage.log import RunLog
from storage.object_store import ObjectStore
from storage.records import Committed, Quarantined, Started, StoredFile
from trainer.rundir import EXIT_COMPLETE, EXIT_PREEMPTED, EXIT_STORE_UNREACHABLE

FILE = "adapter.safetensors"
KILLED = -9


def weights_at(run_id: str, step: int) -> bytes:
    """The bytes that training a run for so many steps must give."""
    weights = b""
    for n in range(1, step + 1):
        weights = _trained(run_id, weights, n)
    return weights


def _trained(run_id: str, weights: bytes, step: int) -> bytes:
    return hashlib.sha256(b"%s %d " % (run_id.encode(), step) + weights).digest()


@dataclass(slots=True)
class Trainer:
    """One attempt, training a step a second wherever it lives, seen or unseen."""

    store: ObjectStore
    log: RunLog
    order: Order
    max_steps: int
    commit_every: int
    step: int = 0
    resumed_from: int = 0
    weights: bytes = b""
    first_step_at: float | None = None
    exit_code: int | None = None
    error: str = ""
    superseded: bool = False
    stopping: bool = False
    asked: bool = False
    """Its agent asked it to stop while it ran."""
    notice: Notice | None = None
    """It was asked to stop because of this."""
    asked_at: float = 0.0
    saved_s: float | None = None
    started: bool = False
    acknowledged: list[Committed] = field(default_factory=list)
    """What the log has told it to have committed."""
    wronged: str = ""
    """It was refused what the attempt that owns the run may append."""

    def begin(self) -> None:
        """Fetch what to resume from; a store that does not answer ends the attempt."""
        try:
            self._begin()
        except Unavailable as error:
            self.exit_code, self.error = EXIT_STORE_UNREACHABLE, str(error)

    def _begin(self) -> None:
        log = self.log
        state = log.refresh()
        running = state.running
        if running is None or running.claimed.incarnation != self.order.incarnation or state.result:
            said = "its order came late: the attempt is over, or there is nothing left to train"
            self.exit_code, self.error, self.superseded = EXIT_PREEMPTED, said, True
            return
        while (newest := state.newest) is not None:
            body = self.store.get(layout.committed_file(self.order.run_id, newest, FILE))
            if hashlib.sha256(body).hexdigest() == newest.files[0].sha256:
                self.step = self.resumed_from = newest.step
                self.weights = body
                return
            state = log.append(Quarantined(checkpoint=newest.ref, reason="sha256 differs", at=0.0))

    def train(self, now: float) -> None:
        """Make one step, or end. A fence ends it as a kill does."""
        if self.exit_code is not None:
            return
        try:
            self._train(now)
        except Unavailable:
            return  # trains on, and says it with the next checkpoint
        except Fenced as error:
            owner = self.log.state.running
            if owner and owner.claimed.incarnation == self.order.incarnation:
                self.wronged = str(error)
            self.exit_code, self.error, self.superseded = KILLED, str(error), True
        except Corrupt as error:
            self.exit_code, self.error = KILLED, str(error)

    def _train(self, now: float) -> None:
        if self.stopping:
            if self.step > self.log.refresh().committed_step:
                self._commit(now)
                self.saved_s = now - self.asked_at
            self._exit(EXIT_PREEMPTED)
            return
        if self.step < self.max_steps:
            self.step += 1
            self.weights = _trained(self.order.run_id, self.weights, self.step)
            if self.first_step_at is None:
                self.first_step_at = now
            if not self.started:
                self.log.append(Started(attempt=self.order.attempt, step=self.resumed_from, at=now))
                self.started = True
            if self.step % self.commit_every == 0 and self.step < self.max_steps:
                self._commit(now)
        if self.step == self.max_steps:
            self._commit(now, final=True)
            self._exit(EXIT_COMPLETE)

    def _exit(self, code: int) -> None:
        if self.exit_code is None:  # else it was killed while the store kept it waiting
            self.exit_code = code

    def _commit(self, now: float, final: bool = False) -> None:
        order = self.order
        key = layout.checkpoint_file(order.run_id, order.attempt, order.incarnation, self.step, FILE)
        self.store.put(key, self.weights)
        digest = hashlib.sha256(self.weights).hexdigest()
        committed = Committed(
            attempt=order.attempt,
            incarnation=order.incarnation,
            step=self.step,
            files=(StoredFile(name=FILE, size_bytes=len(self.weights), sha256=digest),),
            metrics={"train/loss": 1.0 / (1 + self.step), "val/loss": 1.0 / (1 + self.step)},
            final=final,
            at=now,
        )
        try:
            self.log.append(committed)
        except Fenced:
            withdraw(self.store, order.run_id, self.log, key.removesuffix(FILE))
            raise
        self.acknowledged.append(committed)

    def work(self) -> Work:
        return Work(
            run_id=self.order.run_id,
            attempt=self.order.attempt,
            step=self.step,
            resumed_from=self.resumed_from,
            first_step_at=self.first_step_at,
            step_s=1.0,
            loss=1.0 / (1 + self.step),
            exit_code=self.exit_code,
            error=self.error,
            superseded=self.superseded,
            asked=self.asked,
            notice=self.notice,
            saved_s=self.saved_s if self.notice else None,
        )

    def heed(self, notice: Notice, now: float) -> None:
        """Begin to save what there is, unless it is all over."""
        if self.exit_code is None and self.notice is None:
            self.stopping = self.asked = True
            self.notice, self.asked_at = notice, now


@dataclass(slots=True)
class Agent:
    """One slot."""

    slot: str
    node: str
    up_since: float
    trainer: Trainer | None = None
    orders: list[Order] = field(default_factory=list)
    reported: Work | None = None
    silent_since: float | None = None
    frozen: bool = False
    gone: bool = False
    node_lost: bool = False
    standing: Standing = field(default_factory=Standing)

    def holds(self, order: Order) -> bool:
        return self.trainer is not None and self.trainer.order == order

    def heed(self, now: float) -> None:
        """Also when the end comes nearer, or the order was on its way when the notice came."""
        notice = told(self.standing, now)
        if self.trainer and notice and notice.soon:
            self.trainer.heed(notice, now)
