"""Supervises one attempt of one run: training process, replicator and shipper, from claim to exit.

    fetch + verify the newest checkpoint ─► start.json ─► process steps ─► checkpoints/ ─► replicator ─► log

The process loads the base model while its checkpoint is fetched. It never sees the store; what it wrote is
pushed even after it crashed. Knows neither Ray nor torch: an agent actor runs this, and so does
``python -m trainer run``.
"""

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from storage.checkpoints import CheckpointStore
from storage.errors import (
    AccessDenied,
    Corrupt,
    Fenced,
    InvalidName,
    NotFound,
    StorageError,
    Unavailable,
)
from storage.ledger import Ledger
from storage.local import DISK_UNUSABLE, LocalCheckpoint
from storage.object_store import ObjectStore
from storage.records import Committed, Started
from storage.replicator import Replicator

from .claim_watch import ClaimWatch, superseded
from .config import RunSpec
from .evidence import NO_EVIDENCE, Evidence
from .inputs import Find, with_inputs
from .pacing import Pacer
from .patience import one_line, patiently
from .publishing import Publisher
from .rundir import (
    EXIT_COMPLETE,
    EXIT_DISK_FULL,
    EXIT_PREEMPTED,
    EXIT_STORE_UNREACHABLE,
    EXIT_UNFIT,
    Options,
    RunDir,
    StartOrder,
    read_events,
)
from .shipper import Shipper
from .training_process import PLAYER, STUCK, TRAINER, TrainingProcess
from .vigil import Vigil

logger = logging.getLogger(__name__)

POLL_S = 0.05
PUSH_POLL_S = 0.5
PUSH_PATIENCE_S = 900.0
"""How long the last checkpoint may take to reach the store after the process has exited by itself."""
PUSH_AFTER_STOP_S = 120.0
"""The same after the attempt was asked to stop: whoever asked waits for the slot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Which attempt to supervise; the run's spec comes from the store."""

    run_id: str
    attempt: int
    incarnation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Storing:
    """What the attempt's checkpoints took so far; of the seconds, those of the last one."""

    saves: int = 0
    saved_step: int = 0
    save_s: float = 0.0
    stall_s: float = 0.0
    commits: int = 0
    committed_step: int = 0
    committed_at: float = 0.0
    upload_s: float = 0.0
    state_bytes: int = 0
    sent_bytes: int = 0
    errors: int = 0
    error: str = ""
    """The kind of the last error that the store gave."""

    @property
    def reports(self) -> int:
        """Grows with each change."""
        return self.saves + self.commits + self.errors

    @property
    def queued(self) -> int:
        """Checkpoints that wait for the store; what they superseded does not count."""
        return int(self.saved_step > self.committed_step)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What the attempt has done so far."""

    storing: Storing = Storing()
    step: int = 0
    resumed_from: int = 0
    first_step_at: float | None = None
    step_s: float = 0.0
    loss: float | None = None
    error: str = ""
    evidence: Evidence = NO_EVIDENCE
    exit_code: int | None = None
    superseded: bool = False


class Supervisor:
    """Runs one attempt to its end. ``run`` blocks; ``stop`` and ``progress`` are for other threads."""

    def __init__(
        self,
        store: ObjectStore,
        assignment: Assignment,
        spec: RunSpec,
        options: Options,
        *,
        scratch: Path,
        ledger: Ledger,
        process: TrainingProcess | None = None,
        on_change: Callable[[Progress], None] = lambda progress: None,
        find: Find | None = None,
    ) -> None:
        """``find``: where the inputs lie in the store, if this process cannot read their logs."""
        self.assignment = assignment
        self.progress = Progress()
        self._store = store
        self._spec = spec
        self._options = options
        self._ledger = ledger
        self._process = process
        self._on_change = on_change
        self._find = find
        self._run_dir = RunDir(
            scratch / f"{assignment.run_id}-a{assignment.attempt}-{assignment.incarnation}"
        )
        self._checkpoints = CheckpointStore(store, assignment.run_id, ledger)
        self._publisher = Publisher(
            self._checkpoints, assignment.attempt, assignment.incarnation, left_s=self._left_s
        )
        self._shipper = Shipper(store, assignment.run_id, assignment.attempt, self._run_dir)
        self._pacer = Pacer(self._run_dir, options)
        self._claim_watch = ClaimWatch(
            ledger, assignment.run_id, assignment.attempt, assignment.incarnation, self._on_fenced
        )
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._stop_by: float | None = None
        self._fenced = threading.Event()
        self._push_error: Exception | None = None
        self._unusable_result: Exception | None = None
        self._start_recorded = False
        self._events_offset = 0

    def stop(self, grace_s: float) -> None:
        """Ask the attempt to save itself and end; it is killed after ``grace_s``."""
        deadline = time.monotonic() + grace_s
        self._stop_by = deadline if self._stop_by is None else min(self._stop_by, deadline)
        self._stopping.set()

    def run(self) -> Progress:
        """Train until the process exits, push what it saved, and say how it ended.

        Never raises for what the run, the store or the disk does: the attempt ends with a code, and the
        error says why.
        """
        try:
            with with_inputs(
                self._store, self._spec, self._options, self._stopping, self._find
            ) as self._options:
                code = self._train()
        except Fenced as error:
            self._on_fenced(error)
            code = EXIT_PREEMPTED
        except (Unavailable, AccessDenied, Corrupt, NotFound) as error:
            if self._stopping.is_set():  # that is why fetching was given up
                code = EXIT_PREEMPTED
            else:
                # The damage may be this node's disk, memory or way to the store: the next is elsewhere.
                self._fail(error)
                code = EXIT_STORE_UNREACHABLE
        except OSError as error:
            self._fail(error)
            code = EXIT_DISK_FULL if error.errno in DISK_UNUSABLE else 1
        except StorageError as error:
            self._fail(error)
            code = 1
        finally:
            if self._process:
                self._process.kill()
            self._run_dir.remove()
        if self._process and self._process.stuck:
            code = EXIT_UNFIT
            said = f": {self.progress.error}" if self.progress.error else ""
            self._update(error=one_line(f"{STUCK}{said}"))
        self._update(exit_code=code, superseded=self._fenced.is_set())
        return self.progress

    def _train(self) -> int:
        self._prepare()
        process = self._process or TrainingProcess(PLAYER if self._spec.command else TRAINER)
        self._process = process
        process.begin(self._run_dir.root)
        vigil = Vigil(process, self._run_dir, self._options.stall_timeout_s)
        shipper = self._shipper
        replicator = Replicator(
            self._run_dir.checkpoints, self._publish, on_fenced=self._on_fenced, on_error=self._on_push_error
        )
        try:
            self._order_start()
            replicator.start()
            shipper.start()
            self._claim_watch.start()
            code = self._watch(process, vigil)
        finally:
            process.kill()  # whatever it started must not outlive it, nor write on
            pushed = self._push(replicator)
            replicator.stop()
            self._claim_watch.stop()
            shipper.finish(timeout_s=30.0)
        if code == EXIT_COMPLETE and not pushed and not self._fenced.is_set():
            self._fail(
                self._push_error or Unavailable("the final checkpoint did not reach the store in time")
            )
            return EXIT_STORE_UNREACHABLE
        if code == EXIT_COMPLETE and self._unusable_result:
            self._fail(self._unusable_result)
        if code == EXIT_DISK_FULL and not self.progress.error:  # it had no room to say so
            self._update(error=f"DISK_FULL: no room for a checkpoint under {self._run_dir.root}")
        return code

    def _push(self, replicator: Replicator) -> bool:
        """Wait until what the process saved is in the store; False if it is given up."""
        give_up = time.monotonic() + PUSH_PATIENCE_S
        salvaging = threading.Thread()
        while not replicator.drain(PUSH_POLL_S):
            with contextlib.suppress(OSError):  # out of files, for example: what is there is seen next time
                pending = replicator.pending
                if pending is None:
                    return True  # what there is cannot be published at all: waiting would not help
                if self._publisher.is_held_up(pending) and not salvaging.is_alive():
                    salvage = self._publisher.salvage_beside
                    salvaging = threading.Thread(target=salvage, args=(pending,), daemon=True)
                    salvaging.start()
            late = self._stop_by is not None and time.monotonic() > self._stop_by + PUSH_AFTER_STOP_S
            if self._fenced.wait(POLL_S) or late or time.monotonic() > give_up:
                return False
        return True

    def _left_s(self) -> float | None:
        return None if self._stop_by is None else self._stop_by - time.monotonic()

    def _prepare(self) -> None:
        self._run_dir.remove()
        self._run_dir.checkpoints.mkdir(parents=True)
        self._run_dir.spec.write_text(self._spec.model_dump_json())
        self._run_dir.options.write_text(self._options.model_dump_json())
        self._run_dir.alive.touch()
        self._pacer.review()  # before the process looks for the first time

    def _order_start(self) -> None:
        checkpoint, path = patiently(self._fetch, self._stopping)
        resumed_from = checkpoint.step if checkpoint else 0
        self._update(resumed_from=resumed_from, step=resumed_from)
        relative = str(path.relative_to(self._run_dir.root)) if path else None
        self._run_dir.order_start(StartOrder(resume=relative))

    def _fetch(self) -> tuple[Committed | None, Path | None]:
        """Fetch what to resume from, if this attempt may run at all: its order may have come late."""
        state = self._ledger.refresh()
        assigned = self.assignment
        if error := superseded(state, assigned.run_id, assigned.attempt, assigned.incarnation):
            raise error
        if state.result:  # committed by an older attempt just before this one was claimed
            raise Fenced(f"{self.assignment.run_id}: the final checkpoint is committed already")
        return self._checkpoints.fetch_newest(state, self._run_dir.resume, attempt=self.assignment.attempt)

    def _watch(self, process: TrainingProcess, vigil: Vigil) -> int:
        asked, told_by = False, None
        while (code := process.exit_code) is None:
            if process.stuck:
                return EXIT_UNFIT
            self._read_events()
            self._pacer.review()
            if self._fenced.is_set():
                process.kill()
            elif self._stop_by is not None:
                if told_by != self._stop_by:
                    told_by = self._stop_by
                    self._run_dir.order_stop(told_by)
                if not asked:
                    process.terminate()
                    asked = True
                if time.monotonic() > self._stop_by:
                    process.kill()
            elif vigil.hangs(training=self.progress.first_step_at is not None, step_s=self.progress.step_s):
                self._update(error=one_line(vigil.end()))
            time.sleep(POLL_S)
        self._read_events()
        if code != EXIT_COMPLETE and not asked and not self._fenced.is_set():  # else it was us
            self._update(evidence=vigil.evidence(self.progress.evidence))
        # It was asked before it listened, so there is nothing that it could have saved.
        return EXIT_PREEMPTED if asked and code == -signal.SIGTERM else code

    def _publish(self, local: LocalCheckpoint) -> None:
        if self.progress.first_step_at is not None and not self._start_recorded:
            self._record_start()  # the store was away at the first step
        if local.manifest.final:
            # Once this is committed the run is over: if the node dies then, nobody ships the rest.
            self._shipper.ship_results()
        try:
            done = self._publisher.publish(local)
        except (Corrupt, InvalidName) as error:
            if local.final:
                self._unusable_result = error
            raise
        if local.final:
            self._unusable_result = None
        self._claim_watch.valid()
        self._pacer.uploaded(done.seconds)
        self._push_error = None
        self._update_storing(
            lambda storing: replace(
                storing,
                commits=storing.commits + 1,
                committed_step=done.step,
                committed_at=time.time(),
                upload_s=done.seconds,
                state_bytes=storing.state_bytes + done.state_bytes,
                sent_bytes=storing.sent_bytes + done.sent_bytes,
            )
        )

    def _on_push_error(self, error: Exception) -> None:
        self._push_error = error
        self._update_storing(
            lambda storing: replace(storing, errors=storing.errors + 1, error=type(error).__name__)
        )

    def _on_fenced(self, error: Fenced) -> None:
        self._update(error=str(error))
        self._fenced.set()

    def _read_events(self) -> None:
        for offset, event in read_events(self._run_dir.events, self._events_offset):
            self._events_offset = offset
            match event:
                case {"event": "step", "step": int(step)}:
                    self._on_step(step, event)
                case {"event": "checkpoint", "step": int(step), "stall_s": float(stall_s)}:
                    self._on_saved(step, stall_s, event.get("write_s"))
                    self._pacer.checkpointed(event)
                case {"event": "disk_full", "message": str(message)}:
                    logger.warning("%s: DISK_FULL: %s", self.assignment.run_id, one_line(message))
                case {"event": "error", "type": str(kind), "message": str(message)}:
                    hint = event.get("hint")
                    told = event.get("memory_bytes")
                    size = told if isinstance(told, int) else None
                    self._update(
                        error=one_line(f"{kind}: {message}" + (f" ({hint})" if hint else "")),
                        evidence=Evidence(error_type=kind, memory_bytes=size),
                    )

    def _on_step(self, step: int, event: dict[str, object]) -> None:
        first = self.progress.first_step_at is None
        loss, step_s = event.get("loss"), event.get("step_s")
        self._update(
            step=step,
            loss=float(loss) if isinstance(loss, int | float) else None,
            step_s=float(step_s) if isinstance(step_s, int | float) else self.progress.step_s,
            first_step_at=time.time() if first else self.progress.first_step_at,
        )
        if first:
            threading.Thread(target=self._record_start, daemon=True).start()

    def _on_saved(self, step: int, stall_s: float, write_s: object) -> None:
        self._update_storing(
            lambda storing: replace(
                storing,
                saves=storing.saves + 1,
                saved_step=step,
                stall_s=stall_s,
                save_s=float(write_s) if isinstance(write_s, int | float) else 0.0,
            )
        )

    def _record_start(self) -> None:
        progress = self.progress
        record = Started(
            attempt=self.assignment.attempt,
            step=progress.resumed_from,
            at=progress.first_step_at or time.time(),
        )
        try:
            self._ledger.append(record)
            self._start_recorded = True
        except Fenced as error:
            self._on_fenced(error)
        except StorageError:
            pass  # said for people only; training must not depend on it

    def _fail(self, error: Exception) -> None:
        self._update(error=one_line(f"{type(error).__name__}: {error}"))

    def _update_storing(self, change: Callable[[Storing], Storing]) -> None:
        with self._lock:
            self.progress = replace(self.progress, storing=change(self.progress.storing))
        self._on_change(self.progress)

    def _update(self, **changes: object) -> None:
        with self._lock:
            self.progress = replace(self.progress, **changes)  # type: ignore[arg-type]
        self._on_change(self.progress)
