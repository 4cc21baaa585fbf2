"""Sweeps of different ages, and what of them is in a store, for tests of the commands that clean up."""

import os
import time
from pathlib import Path

from support.fake_cluster import small_sweep
from support.invariants import violations
from support.runs import claimed, ended, incarnation, write_checkpoint

from orchestrator.grid.schema import Checkpoint, Metric
from orchestrator.grid.submission import submit
from orchestrator.grid.sweep import Sweep
from storage import layout
from storage.checkpoints import CheckpointStore
from storage.directory import DirectoryStore
from storage.log import run_log
from storage.object_store import ObjectStore
from storage.run_state import RunState

CAT = small_sweep(
    runs=2, name="cat", metric=Metric(name="loss"), checkpoint=Checkpoint(keep_last=2, grace_s=300.0)
)
R0, R1 = (run.run_id for run in CAT.runs)
DAY_S = 86_400.0


def aged(store: DirectoryStore, seconds: float) -> None:
    """Make everything in the store so much older."""
    then = time.time() - seconds
    for info in store.list(""):
        os.utime(store.root / info.key, (then, then))


def keys(store: ObjectStore) -> list[str]:
    return [info.key for info in store.list("")]


def state(store: ObjectStore, run_id: str = R0) -> RunState:
    assert violations(store, run_id) == []
    return run_log(store, run_id).refresh()


def lived(store: ObjectStore, sweep: Sweep, disk: Path) -> None:
    """Submit a sweep, of whose first run a node was lost: five checkpoints, an upload that was cut off."""
    submit(sweep, store)
    run_id = sweep.runs[0].run_id
    log = run_log(store, run_id)
    checkpoints = CheckpointStore(store, run_id, log)
    log.append(claimed())
    for step in (10, 20):
        checkpoints.publish(write_checkpoint(disk / "out", step), 1, incarnation(1))
    store.put(layout.checkpoint_file(run_id, 1, incarnation(1), 30, "half"), b"x" * 1000)
    log.append(ended())
    log.append(claimed(2))
    for step in (30, 40, 50):
        checkpoints.publish(write_checkpoint(disk / "out", step), 2, incarnation(2))
