"""``orchestrate checkpoints``: which a run has, whether they are whole, fetching one, pinning one."""

import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from storage.checkpoints import CheckpointStore
from storage.errors import (
    Corrupt,
    Fenced,
    InvalidName,
    NotFound,
    Unavailable,
)
from storage.garbage.collecting import store_time
from storage.garbage.inventory import Inventory
from storage.ledger import Ledger
from storage.local import step_dir
from storage.log import RunLog, run_log
from storage.object_store import ObjectStore
from storage.records import Committed, Pinned, Unpinned
from storage.run_state import RunState

from ..errors import InvalidFile, OrchestrateError, Problem, Unknown, shown
from ..grid.submission import find_run
from ..grid.sweep import Sweep
from ..reports.view import read_states
from ..usual_store import store_flag
from .cleaning import keep_of

_NAMED = re.compile(r"(?P<run>[^@]+)(?:@(?P<step>\d{1,9}))?")


def parse(name: str) -> tuple[str, int | None]:
    """Return the run and the step that ``R`` or ``R@STEP`` means.

    Raises:
        InvalidFile: It is neither.
    """
    found = _NAMED.fullmatch(name)
    if not found:
        hint = "write it as cat/0, or cat/0@1200 for the checkpoint of a step"
        raise InvalidFile([Problem(code="E2801", message=f"{shown(name)} is no run", hint=hint)])
    return found["run"], None if found["step"] is None else int(found["step"])


class Run:
    """One run's checkpoints, as a command sees them.

    Raises:
        Unknown: There is no such run.
    """

    def __init__(self, store: ObjectStore, name: str) -> None:
        self.store = store
        self.sweep: Sweep
        self.sweep, self.run_id = find_run(store, name)
        self.log: RunLog = run_log(store, self.run_id)
        self.state: RunState = self.log.refresh()

    @property
    def sweep_over(self) -> bool:
        """Whether all runs of the sweep are over: then it has no controller, and none can be started."""
        return all(state.finished for state in read_states(self.sweep, self.store).values())

    def at(self, step: int | None) -> Committed:
        """Return the checkpoint of a step, or the newest there is; a whole one before a salvage.

        Raises:
            Unknown: There is none; the message lists the steps that there are.
        """
        stored = sorted(self.state.stored, key=lambda c: (c.step, c.resumable, c.attempt))
        found = [c for c in stored if step in (None, c.step)]
        if found:
            return found[-1]
        if step is None:
            raise Unknown(f"{self.run_id} has no checkpoint yet")
        steps = ", ".join(str(s) for s in sorted({c.step for c in stored})) or "none"
        raise Unknown(f"{self.run_id} has no checkpoint of step {step}; there are: {steps}")


def listed(run: Run) -> list[dict[str, Any]]:
    """Return a row per checkpoint, oldest first, in the stable form of ``ls -o json``."""
    now = store_time(run.store, Inventory()) or time.time()
    marks = keep_of(run.sweep).marks(run.state)
    quarantined = {ref for ref, _ in run.state.quarantined}
    entries = [e.record for e in run.log.entries() if isinstance(e.record, Committed)]
    salvaged = {(c.ref, c.resumable) for c in run.state.salvaged}
    rows = []
    for c in sorted(entries, key=lambda c: (c.step, c.attempt, c.resumable)):
        words = marks.get(c.ref, ()) if c in run.state.stored else ()
        if c in run.state.retired:
            words = ("retired",)
        elif c.ref in quarantined:
            words = ("quarantined",)
        elif (c.ref, c.resumable) in salvaged:
            words = tuple(dict.fromkeys(("salvage", *words)))
        elif c not in run.state.stored:
            continue  # deleted, or part of a later one
        rows.append(
            {
                "step": c.step,
                "attempt": c.attempt,
                "size_bytes": sum(f.size_bytes for f in c.files),
                "stored_bytes": sum((f.packed or f).size_bytes for f in c.files),
                "committed_at": c.at,
                "age_s": max(0.0, now - c.at),
                "metrics": dict(c.metrics),
                "marks": list(words),
            }
        )
    return rows


def verify(run: Run, step: int | None) -> Iterator[tuple[Committed, str]]:
    """Download each checkpoint, or that of a step, and yield it with what is wrong ("": it is whole).

    Raises:
        Unknown, AccessDenied, Unavailable
    """
    wanted = run.state.stored if step is None else (run.at(step),)
    if not wanted:
        raise Unknown(f"{run.run_id} has no checkpoint yet")
    checkpoints = CheckpointStore(run.store, run.run_id, run.log)
    for checkpoint in wanted:
        with tempfile.TemporaryDirectory(prefix="orchestrate-verify-") as scratch:
            try:
                checkpoints.fetch(checkpoint, Path(scratch) / step_dir(checkpoint.step))
            except (Corrupt, NotFound, InvalidName) as error:
                if checkpoint.ref in {c.ref for c in run.log.refresh().stored}:
                    yield checkpoint, str(error)
                continue  # else it was retired while we looked
        yield checkpoint, ""


def pull(run: Run, step: int | None, out: Path) -> Path:
    """Download a checkpoint, verified, to ``out/<run>/step-<n>``; the folder appears whole or not at all."""
    checkpoint = run.at(step)
    target = out / run.run_id / step_dir(checkpoint.step)
    try:
        (out / run.run_id).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unavailable(f"{error.filename or out}: {error.strerror or error}") from error
    try:
        return CheckpointStore(run.store, run.run_id, run.log).fetch(checkpoint, target)
    except NotFound as error:
        raise Unknown(
            f"{error}; it may have been deleted meanwhile: look again with checkpoints ls"
        ) from error


def pin(run: Run, step: int, ledger: Ledger | None, *, unpin: bool = False) -> str:
    """Pin or unpin the checkpoint of a step; returns what is true now, for a person.

    Raises:
        Unknown: There is no such checkpoint.
        OrchestrateError: Only a controller may write to this store, and none is here.
    """
    if ledger is None and run.sweep_over:
        raise OrchestrateError(
            f"not possible on this store any more: {run.sweep.name} is over, and only a sweep's controller "
            f"may write to {run.store.url}. Without it nothing of {run.sweep.name} is retired either — "
            "for a copy of your own: "
            f"orchestrate checkpoints pull {run.run_id}@{step}{store_flag(run.store.url)}"
        )
    if ledger is None:
        raise OrchestrateError(
            f"{run.store.url}: two writers could both win here, so only the sweep's controller may write — "
            "give its cluster's --address, or start one with: "
            f"orchestrate resume {run.sweep.name}{store_flag(run.store.url)}"
        )
    if unpin:
        refs = [ref for ref in run.state.pinned if ref.step == step]
        if not refs:
            return f"{run.run_id}: step {step} was not pinned"
        for ref in refs:
            _appended(ledger, Unpinned(checkpoint=ref, at=time.time()))
        return f"{run.run_id}: step {step} is not pinned any more"
    checkpoint = run.at(step)
    _appended(ledger, Pinned(checkpoint=checkpoint.ref, at=time.time()))
    return f"{run.run_id}: step {step} is pinned, and stays until it is unpinned"


def _appended(ledger: Ledger, record: Pinned | Unpinned) -> None:
    ref = record.checkpoint
    try:
        ledger.append(record)
    except Fenced as error:
        state = ledger.refresh()
        if (ref in state.pinned) != isinstance(record, Pinned):
            raise Unknown(f"{ref} cannot be {record.kind}: {error}") from error
