"""Crash consistency by enumeration: each operation dies at every of its calls, before and after its effect.

After each death a fresh reader must find that

    every restorable checkpoint is fetched bit by bit,
    what is newest never goes back, and there is always something to resume from,
    a successor can carry out the operation to its end.
"""

from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
from support.flaky_store import Died, Fault, FlakyStore
from support.runs import RUN, claimed, contents, ended, incarnation, read_files, ref, write_checkpoint

from storage import layout
from storage.checkpoints import CheckpointStore
from storage.errors import Unavailable
from storage.log import RunLog, run_log
from storage.memory import MemoryStore
from storage.object_store import ObjectStore
from storage.run_state import RunState

Operation = Callable[[ObjectStore, Path], None]
Prepare = Callable[[ObjectStore, Path], None]


@pytest.fixture
def node(disk_in_memory: Path) -> Path:
    """A node's disk, to which hundreds of checkpoints are flushed."""
    return disk_in_memory


def opened(store: ObjectStore) -> tuple[RunLog, CheckpointStore]:
    log = run_log(store, RUN, sleep=lambda seconds: None)
    log.refresh()
    return log, CheckpointStore(store, RUN, log)


def publish(store: ObjectStore, disk: Path, step: int) -> None:
    log, checkpoints = opened(store)
    attempt = log.state.attempt
    checkpoints.publish(write_checkpoint(disk, step), attempt, incarnation(attempt))


def prepare_two_checkpoints(store: ObjectStore, disk: Path) -> None:
    run_log(store, RUN).append(claimed())
    publish(store, disk, 10)
    publish(store, disk, 20)


def prepare_three_of_which_two_are_retired(store: ObjectStore, disk: Path) -> None:
    prepare_two_checkpoints(store, disk)
    publish(store, disk, 30)
    opened(store)[1].retire([ref(10), ref(20)])


def prepare_a_damaged_newest(store: ObjectStore, disk: Path) -> None:
    prepare_two_checkpoints(store, disk)
    newest = run_log(store, RUN).refresh().newest
    assert newest is not None
    store.put(layout.committed_file(RUN, newest, "adapter.safetensors"), b"damaged")


def prepare_orphans(store: ObjectStore, disk: Path) -> None:
    prepare_two_checkpoints(store, disk)
    for file in ("a", "b", "c"):
        store.put(layout.checkpoint_file(RUN, 1, incarnation(1), 30, file), b"half uploaded")
    log = run_log(store, RUN)
    log.append(ended(1))
    log.append(claimed(2))


def claim(store: ObjectStore, disk: Path) -> None:
    """Requeue the run and claim it for a new attempt; if a predecessor did half of that, do the rest."""
    log, _ = opened(store)
    if log.state.attempt == 1:
        if log.state.running:
            log.append(ended(1))
        log.append(claimed(2))


def commit(store: ObjectStore, disk: Path) -> None:
    publish(store, disk, 30)


def retire(store: ObjectStore, disk: Path) -> None:
    log, checkpoints = opened(store)
    checkpoints.retire(c.ref for c in log.state.checkpoints[:-1])


def reap(store: ObjectStore, disk: Path) -> None:
    log, checkpoints = opened(store)
    checkpoints.reap(log.state)


def resume(store: ObjectStore, disk: Path) -> None:
    log, checkpoints = opened(store)
    checkpoint, _ = checkpoints.fetch_newest(log.state, disk / "resume", attempt=log.state.attempt)
    assert checkpoint is not None


def sweep(store: ObjectStore, disk: Path) -> None:
    log, checkpoints = opened(store)
    checkpoints.sweep_orphans(log.state)


OPERATIONS: dict[str, tuple[Prepare, Operation, Callable[[RunState], bool], int]] = {
    # name: what was before, what dies, what holds once a successor is done, how many objects there are then
    "claim": (prepare_two_checkpoints, claim, lambda s: s.attempt == 2 and s.running is not None, 4),
    "commit": (prepare_two_checkpoints, commit, lambda s: s.committed_step == 30, 6),
    "retire": (prepare_two_checkpoints, retire, lambda s: [c.step for c in s.retired] == [10], 4),
    "reap": (prepare_three_of_which_two_are_retired, reap, lambda s: s.retired == (), 2),
    "resume": (prepare_a_damaged_newest, resume, lambda s: s.committed_step == 10, 4),
    "sweep": (prepare_orphans, sweep, lambda s: s.committed_step == 20, 4),
}


def assert_whole(store: ObjectStore, disk: Path, *, damaged: int | None, least: int) -> RunState:
    """Check what a fresh reader on a fresh node finds."""
    log, checkpoints = opened(store)
    state = log.state
    for checkpoint in state.checkpoints:
        if checkpoint.step != damaged:
            fetched = checkpoints.fetch(checkpoint, disk / "check" / f"step-{checkpoint.step:09d}")
            assert read_files(fetched) == contents(checkpoint.step)
    assert state.committed_step >= least
    assert not {c.ref for c in state.checkpoints} & {c.ref for c in state.retired}
    return state


@pytest.mark.parametrize("fault", [Fault.DIE_BEFORE, Fault.DIE_HALF_WAY, Fault.DIE_AFTER])
@pytest.mark.parametrize("name", OPERATIONS)
def test_death_at_any_call_leaves_a_whole_run_that_a_successor_completes(
    name: str, fault: Fault, node: Path
) -> None:
    prepare, operate, done, objects = OPERATIONS[name]
    damaged = 20 if name == "resume" else None
    before = MemoryStore()
    prepare(before, node / "before")
    least = 10 if damaged else run_log(before, RUN).refresh().committed_step
    for at in count(1):
        disk, store = node / str(at), copied(before)

        died = False
        try:
            operate(FlakyStore(store, at, fault), disk / "dying")
        except Died:
            died = True
        assert_whole(store, disk / "after", damaged=damaged, least=least)

        operate(store, disk / "successor")
        state = assert_whole(store, disk / "end", damaged=damaged, least=least)
        assert done(state)
        assert len(list(store.list(layout.data_prefix(RUN)))) == objects
        if not died:
            assert at > 3, "the operation has calls to die at"
            return


@pytest.mark.parametrize("fault", [Fault.LOSE_REPLY, Fault.REFUSE])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_reply_lost_at_any_call_repeats_no_record(name: str, fault: Fault, node: Path) -> None:
    prepare, operate, done, objects = OPERATIONS[name]
    before = MemoryStore()
    prepare(before, node / "before")
    calm = copied(before)
    operate(calm, node / "calm")
    for at in count(1):
        disk, store = node / str(at), copied(before)
        flaky = FlakyStore(store, at, fault)
        for _ in range(2):
            try:
                operate(flaky, disk / "node")
                break
            except Unavailable:
                continue  # what any caller does: the same again

        log, _ = opened(store)
        assert done(log.state)
        assert kinds(store) == kinds(calm)
        assert len(list(store.list(layout.data_prefix(RUN)))) == objects
        if flaky.calls < at:
            return


def copied(store: ObjectStore) -> MemoryStore:
    copy = MemoryStore()
    for info in store.list(""):
        copy.put(info.key, store.get(info.key))
    return copy


def kinds(store: ObjectStore) -> list[str]:
    return [entry.record.kind for entry in opened(store)[0].entries()]
