"""Numbers of agents and controllers, exported with Ray's metrics as ``ray_orch_…``. Labels are bounded."""

import math
from collections import Counter as Count
from collections.abc import Iterable, Mapping, Sequence

from ray.util.metrics import Counter, Gauge, Histogram

from storage.run_state import RunState
from trainer.supervisor import Storing

from ..control.placing import SlotNote, Standing
from ..reports.tally import Tally, added, goodput, spent_usd, tally
from ..reports.view import Status, status

SECONDS = [0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000]
RUN_LABELS = 500
"""Only so many runs of a sweep, its first, have numbers of their own: each is a series to store."""


class AgentMetrics:
    """What one agent counts, whichever runs it serves."""

    def __init__(self, sweep: str) -> None:
        self._sweep = {"sweep": sweep}
        self._steps = Counter("orch_steps_total", "Optimizer steps trained.", tag_keys=("sweep",))
        self._attempts = Counter("orch_attempts_started_total", "Attempts started.", tag_keys=("sweep",))
        self._fenced = Counter("orch_fenced_total", "Attempts stopped by a newer one.", tag_keys=("sweep",))
        self._step = Gauge("orch_run_step", "The run's newest step.", tag_keys=("sweep", "run"))
        self._loss = Gauge("orch_run_loss", "The run's newest loss.", tag_keys=("sweep", "run"))
        self._state_bytes = Counter(
            "orch_ckpt_bytes_total", "Bytes of committed checkpoints.", tag_keys=("sweep",)
        )
        self._sent_bytes = Counter(
            "orch_ckpt_sent_bytes_total", "Bytes sent for them: fewer where packed.", tag_keys=("sweep",)
        )
        self._stall_s = Histogram(
            "orch_ckpt_stall_seconds", "Training stood still.", SECONDS[:5], tag_keys=("sweep",)
        )
        self._save_s = Histogram(
            "orch_ckpt_save_seconds", "A checkpoint was written to the disk.", SECONDS, tag_keys=("sweep",)
        )
        self._upload_s = Histogram(
            "orch_ckpt_upload_seconds", "A checkpoint was packed, sent, committed.", SECONDS, ("sweep",)
        )
        self._errors = Counter("orch_storage_errors_total", "Publishing failed.", tag_keys=("sweep", "code"))
        self._queue = Gauge("orch_upload_queue", "Checkpoints waiting to be sent.", tag_keys=("sweep", "run"))
        self._committed_at = Gauge(
            "orch_last_commit_timestamp", "Unix time of the newest commit.", tag_keys=("sweep", "run")
        )
        self._counted = 0
        self._stored = Storing()

    def attempt_started(self) -> None:
        self._attempts.inc(tags=self._sweep)
        self._counted = 0
        self._stored = Storing()

    def stepped(self, run_id: str, step: int, resumed_from: int, loss: float | None) -> None:
        """Count the steps since the last call; those before ``resumed_from`` were another attempt's."""
        new = step - max(self._counted, resumed_from)
        if new > 0:
            self._steps.inc(new, tags=self._sweep)
            self._set(self._step, run_id, step)
            if loss is not None and math.isfinite(loss):
                self._set(self._loss, run_id, loss)
            self._counted = step

    def stored(self, run_id: str, now: Storing) -> None:
        """Count what the attempt's checkpoints took since the last call."""
        before = self._stored
        if now.reports <= before.reports:
            return  # nothing new, or overtaken by a newer report
        self._stored = now
        if now.saves > before.saves:
            self._stall_s.observe(now.stall_s, tags=self._sweep)
            self._save_s.observe(now.save_s, tags=self._sweep)
        if now.commits > before.commits:
            self._upload_s.observe(now.upload_s, tags=self._sweep)
            self._set(self._committed_at, run_id, now.committed_at)
        for counter, more in (
            (self._state_bytes, now.state_bytes - before.state_bytes),
            (self._sent_bytes, now.sent_bytes - before.sent_bytes),
        ):
            if more > 0:
                counter.inc(more, tags=self._sweep)
        if now.errors > before.errors:
            self._errors.inc(now.errors - before.errors, tags=self._sweep | {"code": now.error})
        self._set(self._queue, run_id, now.queued)

    def fenced(self) -> None:
        self._fenced.inc(tags=self._sweep)

    def _set(self, gauge: Gauge, run_id: str, value: float) -> None:
        if has_label(run_id):
            gauge.set(value, tags=self._sweep | {"run": run_id})


def has_label(run_id: str) -> bool:
    """Whether a run has numbers of its own: by its place in the sweep, as its id tells it."""
    place = run_id.rsplit("-", 2)[-2:][0]
    return place.isdecimal() and int(place) < RUN_LABELS


class ControllerMetrics:
    """What a controller knows of its sweep as a whole.

    Counters begin with the controller: what attempts came to before, an earlier one has counted.

    Args:
        price_per_hour: USD for what one run occupies, if that is known.
    """

    def __init__(self, sweep: str, price_per_hour: float | None = None) -> None:
        self._sweep = {"sweep": sweep}
        self._price_per_hour = price_per_hour
        by_reason = ("sweep", "reason")
        self._ends = Counter("orch_attempts_total", "Attempts that ended, by why.", tag_keys=by_reason)
        self._lost_steps = Counter("orch_lost_steps_total", "Steps that were trained again.", by_reason)
        self._lost_s = Counter("orch_lost_seconds_total", "Seconds of such steps.", tag_keys=by_reason)
        self._notices = Counter(
            "orch_notice_total", "Notices of a node's end, by what came of them.", ("sweep", "outcome")
        )
        self._goodput = Gauge(
            "orch_goodput_ratio", "Preserved training time by allocated time.", tag_keys=("sweep",)
        )
        self._spent = Gauge("orch_spend_usd", "What the time of attempts has cost.", tag_keys=("sweep",))
        self._runs = Gauge("orch_runs", "Runs, by status.", tag_keys=("sweep", "status"))
        self._slots = Gauge("orch_slots", "Slots, by what they can do now.", tag_keys=("sweep", "standing"))
        self._alive_at = Gauge(
            "orch_controller_timestamp", "Unix time of the controller's last look.", tag_keys=("sweep",)
        )
        self._states: dict[str, RunState] = {}
        self._tallies: dict[str, Tally] = {}
        self._let_off: set[str] | None = None
        """The nodes whose notice stood withdrawn the last time; None: nobody has looked yet."""

    def observe(self, states: Mapping[str, RunState], notes: Sequence[SlotNote], now: float) -> None:
        """Say how things are, and count what has changed since the last time."""
        for run_id, state in states.items():
            if state is not self._states.get(run_id):
                self._count(run_id, state)
        self._states = dict(states)
        ratio = goodput(states, now)
        if ratio is not None:
            self._goodput.set(ratio, tags=self._sweep)
        if self._price_per_hour is not None:
            self._spent.set(spent_usd(states, now, self._price_per_hour), tags=self._sweep)
        self._count_false(notes)
        statuses, standings = Count(map(status, states.values())), Count(note.standing for note in notes)
        for word in Status:
            self._runs.set(statuses[word], tags=self._sweep | {"status": word})
        for standing in Standing:
            self._slots.set(standings[standing], tags=self._sweep | {"standing": standing})
        self._alive_at.set(now, tags=self._sweep)

    def _count_false(self, notes: Iterable[SlotNote]) -> None:
        """Count the notices that were taken back, one a node; an earlier controller has seen the rest."""
        let_off = {note.node for note in notes if note.let_off and note.standing is not Standing.GONE}
        if self._let_off is not None and (new := let_off - self._let_off):
            self._notices.inc(len(new), tags=self._sweep | {"outcome": "false"})
        self._let_off = let_off

    def _count(self, run_id: str, state: RunState) -> None:
        total = tally(state)
        known, self._tallies[run_id] = self._tallies.get(run_id), total
        if known is None:
            return  # as the controller found it
        new = added(total, known)
        for counter, amounts in (
            (self._ends, new.ends),
            (self._lost_steps, new.lost_steps),
            (self._lost_s, new.lost_s),
        ):
            for reason, amount in amounts.items():
                counter.inc(amount, tags=self._sweep | {"reason": str(reason)})
        for outcome, times in new.notices.items():
            self._notices.inc(times, tags=self._sweep | {"outcome": outcome})
