"""Carrying a plan out: cut off anywhere, twice at once, on a store that refuses."""

import contextlib
from itertools import count
from pathlib import Path

import pytest
from support.flaky_store import Died, Fault, FlakyStore
from support.invariants import leftovers as unexplained
from support.invariants import violations
from support.runs import RUN, claimed, ended, finished, incarnation, ref, retired, write_checkpoint

from storage import layout
from storage.checkpoints import CheckpointStore
from storage.errors import AccessDenied, Corrupt, Unavailable
from storage.garbage.collecting import Collected, collect_loose, collect_run, read_logs
from storage.garbage.inventory import take
from storage.garbage.rules import Keep, plan_run
from storage.log import run_log
from storage.memory import MemoryStore
from storage.object_store import ObjectInfo, ObjectStore
from storage.records import Pinned, Reaped, Retired, RunEntry
from storage.run_state import RunState

KEEP = Keep(last=2)


@pytest.fixture
def disk(disk_in_memory: Path) -> Path:
    return disk_in_memory


def busy(disk: Path, *, over: bool = False) -> MemoryStore:
    """A run with something of every kind to collect: retired, superseded, half uploaded."""
    store = MemoryStore()
    log = run_log(store, RUN)
    checkpoints = CheckpointStore(store, RUN, log)
    log.append(claimed())
    for step in (10, 20):
        checkpoints.publish(write_checkpoint(disk / "out", step), 1, incarnation(1))
    store.put(layout.checkpoint_file(RUN, 1, incarnation(1), 30, "half"), b"half uploaded")
    log.append(ended())
    log.append(claimed(2))
    for step in (30, 40, 50):
        checkpoints.publish(write_checkpoint(disk / "out", step), 2, incarnation(2))
    log.append(retired(ref(10)))
    if over:
        log.append(finished())
    return store


def collect(store: ObjectStore, *, keep: Keep | None = KEEP, record: bool = True) -> Collected:
    """What one ``gc`` does with the run, its grace being over at once."""
    objects = take(store).runs[RUN]
    log = read_logs(store, [RUN])[RUN]
    assert not isinstance(log, Corrupt)
    plan = plan_run(RUN, objects, log.state, log.entries(), keep=keep, grace_s=0.0, now_s=None)
    done = Collected()
    for part in collect_run(store, plan, log if record else None, clock=lambda: 9.0):
        done.add(part)
    return done


def sound(store: ObjectStore) -> RunState:
    """What a fresh reader finds: nothing is violated."""
    assert violations(store, RUN) == []
    return run_log(store, RUN).refresh()


def clean(store: ObjectStore) -> None:
    state = sound(store)
    assert [c.step for c in state.checkpoints] == [40, 50]
    assert state.retired == ()
    assert unexplained(store, RUN, state) == []


def copied(store: MemoryStore) -> MemoryStore:
    copy = MemoryStore()
    for info in store.list(""):
        copy.put(info.key, store.get(info.key))
    return copy


def test_two_collections_leave_only_what_is_kept(disk: Path) -> None:
    store = busy(disk)

    first = collect(store)
    # 30 and its successors are attempt 2's; what it resumed from, 20, stays while it runs.
    assert (first.retired, first.objects) == (1, 3)
    run_log(store, RUN).append(finished())
    assert collect(store).retired == 1
    collect(store)

    clean(store)
    nothing = collect(store)
    assert nothing == Collected()


@pytest.mark.parametrize("fault", list(Fault))
def test_a_collection_that_is_cut_off_anywhere_is_finished_by_the_next(fault: Fault, disk: Path) -> None:
    before = busy(disk, over=True)
    for at in count(1):
        store = copied(before)
        flaky = FlakyStore(store, at, fault)
        with contextlib.suppress(Died, Unavailable):
            collect(flaky)
        sound(store)
        collect(store)
        collect(store)
        clean(store)
        if flaky.calls < at:
            return


class Interleaved(FlakyStore):
    """Runs another collection in the middle of this one."""

    def __init__(self, inner: ObjectStore, at: int) -> None:
        super().__init__(inner, at, Fault.DIE_BEFORE)
        self._now = at

    def _call(self, effect, half=lambda: None):  # type: ignore[no-untyped-def]
        self.calls += 1
        if self.calls == self._now:
            collect(self._inner)
        return effect()


def test_two_collections_at_once_are_as_good_as_one_after_the_other(disk: Path) -> None:
    before = busy(disk, over=True)
    for at in count(1):
        store = copied(before)
        both = Interleaved(store, at)
        assert collect(both).failed == ""
        sound(store)
        collect(store)
        clean(store)
        if both.calls < at:
            return


def test_a_pin_that_comes_between_plan_and_record_wins(disk: Path) -> None:
    store = busy(disk, over=True)
    log = run_log(store, RUN)
    plan = plan_run(
        RUN, take(store).runs[RUN], log.refresh(), log.entries(), keep=KEEP, grace_s=1e9, now_s=None
    )
    run_log(store, RUN).append(Pinned(checkpoint=ref(20), at=1.0))

    done = Collected()
    for part in collect_run(store, plan, log):
        done.add(part)

    state = sound(store)
    assert [c.step for c in state.retired] == [10, 30]
    assert [c.step for c in state.checkpoints] == [20, 40, 50]


def test_who_may_not_append_still_deletes_what_needs_no_record(disk: Path) -> None:
    store = busy(disk, over=True)

    done = collect(store, record=False)

    assert (done.retired, done.objects) == (0, 3)
    assert [c.step for c in sound(store).retired] == [10]
    assert not any("/data/000001-00000001/000000010/" in info.key for info in store.list(""))
    assert collect(store, record=False) == Collected()


class Locked(FlakyStore):
    """Refuses to delete some objects."""

    def __init__(self, inner: ObjectStore, part: str) -> None:
        super().__init__(inner, 0, Fault.DIE_BEFORE)
        self._part = part

    def delete(self, keys):  # type: ignore[no-untyped-def]
        for key in keys:
            if self._part in key:
                raise AccessDenied(f"{key}: locked")
            self._inner.delete([key])


def test_an_object_that_may_not_be_deleted_stops_nothing_else(disk: Path) -> None:
    store = busy(disk, over=True)

    done = collect(Locked(store, "/000000030/half"))

    assert done.denied.endswith("/000000030/half: locked")
    assert done.retired == 2
    state = sound(store)
    assert [c.step for c in state.retired] == [20, 30]
    collect(store)
    clean(store)


def test_a_retired_checkpoint_whose_data_is_locked_stays_retired(disk: Path) -> None:
    store = busy(disk, over=True)
    done = collect(Locked(store, "adapter"))
    assert "locked" in done.denied
    assert ref(10) in {c.ref for c in sound(store).retired}


def test_a_store_that_refuses_every_delete_is_said_once() -> None:
    store = MemoryStore()
    infos = [ObjectInfo(f"probe/a/{n}", 1) for n in range(3)]
    assert collect_loose(Locked(store, "probe"), infos).denied == "probe/a/0: locked"


def test_what_was_retired_and_reaped_by_another_is_no_failure(disk: Path) -> None:
    store = busy(disk, over=True)
    log = run_log(store, RUN)
    log.refresh()
    plan = plan_run(RUN, take(store).runs[RUN], log.state, log.entries(), keep=KEEP, grace_s=0, now_s=None)
    collect(store)
    collect(store)

    done = Collected()
    for part in collect_run(store, plan, log):
        done.add(part)
    assert (done.failed, done.denied, done.retired) == ("", "", 0)
    clean(store)
    records = [e.record for e in run_log_entries(store)]
    assert [r for r in records if isinstance(r, Retired | Reaped)] == [
        Retired(checkpoints=(ref(10),), at=4.0),
        Reaped(checkpoints=(ref(10),), at=9.0),
        Retired(checkpoints=(ref(20), ref(30, 2)), at=9.0),
        Reaped(checkpoints=(ref(20), ref(30, 2)), at=9.0),
    ]


def run_log_entries(store: ObjectStore) -> tuple[RunEntry, ...]:
    log = run_log(store, RUN)
    log.refresh()
    return log.entries()
