"""A run's checkpoints on real stores, from the first commit to the last byte deleted."""

from pathlib import Path

from support.runs import (
    RUN,
    claimed,
    contents,
    ended,
    finished,
    incarnation,
    read_files,
    ref,
    write_checkpoint,
)

from storage import layout
from storage.checkpoints import CheckpointStore
from storage.log import run_log
from storage.object_store import ObjectStore
from storage.records import Quarantined


def test_a_run_lives_through_damage_a_lost_node_and_pruning(store: ObjectStore, tmp_path: Path) -> None:
    log = run_log(store, RUN)
    checkpoints = CheckpointStore(store, RUN, log)

    def publish(step: int, attempt: int, *, final: bool = False) -> None:
        local = write_checkpoint(tmp_path / "out", step, final=final)
        checkpoints.publish(local, attempt, incarnation(attempt))

    log.append(claimed(1))
    for step in (10, 20, 30):
        publish(step, 1)
    damaged = log.state.newest
    assert damaged is not None
    store.put(layout.committed_file(RUN, damaged, "adapter.safetensors"), b"rot")
    half_uploaded = layout.checkpoint_file(RUN, 1, incarnation(1), 40, "adapter.safetensors")
    store.put(half_uploaded, b"the node died here")

    # A successor on another node knows nothing but the store.
    log.append(ended(1))
    log.append(claimed(2))
    checkpoint, path = checkpoints.fetch_newest(run_log(store, RUN).refresh(), tmp_path / "in", attempt=2)
    assert checkpoint is not None
    assert path is not None
    assert checkpoint.step == 20
    assert read_files(path) == contents(20)
    assert [e.record.checkpoint for e in log.entries() if isinstance(e.record, Quarantined)] == [damaged.ref]

    publish(30, 2)
    publish(40, 2, final=True)
    checkpoints.retire([ref(10), ref(20), ref(30, 2)])
    checkpoints.reap(log.state)
    log.append(finished())
    checkpoints.sweep_orphans(log.state)

    state = run_log(store, RUN).refresh()
    assert state.result is not None
    assert [info.key for info in store.list(layout.data_prefix(RUN))] == [
        layout.committed_file(RUN, state.result, name) for name in sorted(contents(40))
    ]
    fetched = checkpoints.fetch(state.result, tmp_path / "result" / "step-000000040")
    assert read_files(fetched) == contents(40)
