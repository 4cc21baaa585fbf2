"""What may go and what may not, as plain values, and that carrying it out may be cut off anywhere."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.flaky_store import Died, Fault, FlakyStore
from support.invariants import leftovers as unexplained
from support.invariants import violations
from support.runs import (
    RUN,
    claimed,
    committed,
    ended,
    finished,
    incarnation,
    ref,
    retired,
    write_checkpoint,
)

from storage import layout
from storage.checkpoints import CheckpointStore
from storage.content.hashing import hashed
from storage.content.store import store_for
from storage.errors import AccessDenied, Corrupt, Unavailable
from storage.garbage.collecting import (
    Collected,
    collect_content,
    collect_loose,
    collect_run,
    collect_uploads,
    plan_contents,
    read_logs,
)
from storage.garbage.inventory import RunObjects, sort_out, take
from storage.garbage.rules import (
    ABANDONED_S,
    GRACE_S,
    Keep,
    leftovers,
    orphans,
    plan_run,
)
from storage.log import run_log
from storage.memory import MemoryStore
from storage.object_store import ObjectInfo, ObjectStore
from storage.records import (
    Committed,
    Entry,
    Pinned,
    Quarantined,
    Reaped,
    Record,
    Retired,
    RunEntry,
    Started,
)
from storage.run_state import RunState, fold

KEEP = Keep(last=2)


def history(*records: Record) -> tuple[RunState, list[RunEntry]]:
    """The state after these records, all of them admitted, and their entries."""
    entries = [Entry[Record](seq=n, nonce="0" * 32, prev="", record=r) for n, r in enumerate(records)]
    state = RunState()
    for entry in entries:
        after = fold(state, entry)
        assert after != state, f"{entry.record} is refused"
        state = after
    return state, entries


def salvage(step: int, attempt: int = 1) -> Committed:
    return committed(step, attempt).model_copy(update={"resumable": False})


def data(*checkpoints: Committed, size_bytes: int = 10) -> list[ObjectInfo]:
    return [
        ObjectInfo(layout.committed_file(RUN, c, f.name), size_bytes) for c in checkpoints for f in c.files
    ]


def planned(
    state: RunState,
    entries: list[RunEntry],
    *,
    objects: RunObjects | None = None,
    keep: Keep | None = KEEP,
    grace_s: float = 300.0,
    now_s: float | None = None,
) -> tuple[list[int], list[int], list[int]]:
    """The steps that a plan retires, reaps, and lets wait."""
    plan = plan_run(RUN, objects or RunObjects(), state, entries, keep=keep, grace_s=grace_s, now_s=now_s)
    return (
        [d.checkpoint.step for d in plan.retire],
        [d.checkpoint.step for d in plan.reap],
        [d.checkpoint.step for d in plan.waiting],
    )


def test_each_thing_is_sorted_to_whose_it_is() -> None:
    data = layout.checkpoint_file(RUN, 1, incarnation(1), 10, "adapter.safetensors")
    text, sample = layout.log_text_key(RUN, 1, 0), layout.sample_key(RUN, 10, "0.png")
    entry, content = (
        layout.log_entry(layout.run_log_prefix(RUN), 3),
        layout.content_listing("a" * 64, "0" * 8),
    )
    keys = [data, text, sample, entry, layout.run_spec(RUN), layout.sweep_spec("cat"), content, "runs/UP/x"]

    found = sort_out(
        (ObjectInfo(key, 1) for key in keys),
        [ObjectInfo(data, 0), ObjectInfo(sample, 0), ObjectInfo("somebody/elses", 0)],
    )

    run = found.runs[RUN]
    assert [info.key for info in (*run.data, *run.text, *run.samples, *run.rest)] == [
        data, text, sample, layout.run_spec(RUN),
    ]  # fmt: skip
    assert {seq: info.key for seq, info in run.log.items()} == {3: entry}
    assert [info.key for info in run.unfinished] == [data]
    assert [info.key for info in found.stray_uploads] == [sample], "another's upload is not ours to end"
    assert list(found.sweeps) == ["cat"]
    assert [info.key for info in found.contents["a" * 64].data["0" * 8]] == [content]
    assert [info.key for info in found.unknown] == ["runs/UP/x"]


@pytest.mark.parametrize(
    "key",
    [
        layout.sweep_spec("cat"),
        layout.run_spec(RUN),
        layout.log_entry(layout.run_log_prefix(RUN), 3),
        layout.checkpoint_file(RUN, 1, incarnation(1), 10, "adapter.safetensors"),
        layout.sample_key(RUN, 10, "0.png"),
        layout.log_entry(layout.content_log_prefix("a" * 64), 0),
        layout.content_listing("a" * 64, incarnation(1)),
        "somebody/elses",
    ],
)
def test_whatever_was_written_last_tells_the_time(key: str) -> None:
    older = ObjectInfo(layout.run_spec("another"), 1, 100.0)
    assert sort_out([ObjectInfo(key, 1, 200.0), older]).newest_s == 200.0


# what is superseded


def test_all_but_what_must_stay_is_retired_and_each_that_stays_has_its_reasons() -> None:
    state, entries = history(
        claimed(),
        *(committed(s, metrics={"loss": loss}) for s, loss in ((10, 0.1), (20, 0.9), (30, 0.8))),
        ended(),
        claimed(2),
        Started(attempt=2, step=30, at=1.0),
        *(committed(s, 2, metrics={"loss": 0.5}) for s in (40, 50, 60, 70)),
        Pinned(checkpoint=ref(40, 2), at=1.0),
    )
    keep = Keep(last=2, every=25, metric="loss")

    assert planned(state, entries, keep=keep)[0] == [20]
    assert keep.marks(state) == {
        ref(10): ("best",),
        ref(30): ("resumed from",),
        ref(40, 2): ("pinned",),
        ref(50, 2): ("milestone",),
        ref(60, 2): ("keep_last",),
        ref(70, 2): ("newest",),
    }


def test_a_run_that_goes_on_keeps_two_whatever_is_asked() -> None:
    live, entries = history(claimed(), committed(10), committed(20), committed(30))
    over, _ = history(claimed(), committed(10), committed(20), committed(30), finished())

    assert planned(live, entries, keep=Keep(last=1))[0] == [10]
    assert planned(over, entries, keep=Keep(last=1))[0] == [10, 20]


def test_nothing_of_a_run_without_a_sweep_is_superseded() -> None:
    state, entries = history(claimed(), committed(10), committed(20), committed(30), finished())
    assert planned(state, entries, keep=None)[0] == []


def test_a_salvage_goes_once_a_whole_checkpoint_is_as_far_and_its_attempt_is_over() -> None:
    story = [claimed(), salvage(10), ended(), claimed(2), salvage(15, 2)]
    state, entries = history(*story)
    assert planned(state, entries)[0] == [10]

    state, entries = history(*story, committed(20, 2))
    assert planned(state, entries)[0] == [10], "attempt 2 may yet complete what it began"

    state, entries = history(*story, committed(20, 2), ended(2))
    assert planned(state, entries)[0] == [10, 15]


# the two phases


@pytest.mark.parametrize(
    ("written", "now", "ripe"),
    [
        (1000.0, 1299.0, False),
        (1000.0, 1300.0, True),
        (1000.0, None, False),
        (None, 1e9, False),
        (9000.0, 1300.0, False),
    ],
)
def test_what_was_retired_waits_for_its_grace_by_the_stores_clock(
    written: float | None, now: float | None, ripe: bool
) -> None:
    # The record's own time says 4 s after the epoch: nobody asks it.
    state, entries = history(claimed(), committed(10), committed(20), committed(30), retired(ref(10)))
    objects = RunObjects(log={4: ObjectInfo("log/4", 1, written)}, data=data(committed(10)))

    expected = ([10], []) if ripe else ([], [10])
    assert planned(state, entries, objects=objects, now_s=now)[1:] == expected


def test_a_file_that_a_whole_checkpoint_names_is_spared_when_its_salvage_goes() -> None:
    whole = committed(20)
    state, entries = history(claimed(), salvage(10), ended(), claimed(2), committed(30, 2), retired(ref(10)))
    shared = data(salvage(10))
    state = RunState(
        attempts=state.attempts,
        checkpoints=(whole.model_copy(update={"step": 10}), *state.checkpoints),
        retired=state.retired,
    )
    plan = plan_run(RUN, RunObjects(data=shared), state, entries, keep=None, grace_s=0.0, now_s=None)
    assert [d.sized for d in plan.reap] == [()]


# orphans


def test_only_fenced_and_unnamed_data_is_an_orphan() -> None:
    state, _ = history(
        claimed(),
        committed(10),
        committed(20),
        Quarantined(checkpoint=ref(20), reason="rot", at=1.0),
        ended(),
        claimed(2),
        committed(15, 2),
    )
    named = data(committed(10), committed(15, 2))
    lost = data(committed(30))
    in_a_named_prefix = [ObjectInfo(layout.checkpoint_file(RUN, 1, incarnation(1), 10, "half"), 1)]
    under_way = data(committed(25, 2))
    unknown = data(committed(40, 3))
    quarantined = data(committed(20))
    others = [ObjectInfo(named[0].key.replace(RUN, "other"), 1), ObjectInfo(f"runs/{RUN}/data/what", 1)]
    everything = [*named, *lost, *in_a_named_prefix, *under_way, *unknown, *quarantined, *others]

    assert orphans(RUN, state, everything) == (*lost, *in_a_named_prefix)
    over = fold(state, Entry[Record](seq=9, nonce="0" * 32, prev="", record=finished()))
    assert orphans(RUN, over, everything) == (*lost, *in_a_named_prefix, *under_way, *quarantined)


def test_only_uploads_of_fenced_attempts_are_ended() -> None:
    state, entries = history(claimed(), ended(), claimed(2))
    unfinished = [ObjectInfo(info.key, 0) for info in data(committed(10), committed(10, 2), committed(10, 3))]
    objects = RunObjects(unfinished=unfinished)

    plan = plan_run(RUN, objects, state, entries, keep=None, grace_s=0.0, now_s=None)
    assert (plan.uploads, plan.unfinished) == ((f"runs/{RUN}/data/000001-00000001/",), 1)

    over, entries = history(claimed(), ended(), claimed(2), finished())
    plan = plan_run(RUN, objects, over, entries, keep=None, grace_s=0.0, now_s=None)
    assert (plan.uploads, plan.unfinished) == ((f"runs/{RUN}/data/",), 3)


def test_what_is_pinned_stays_whatever_a_node_says_of_it() -> None:
    state, _ = history(
        claimed(),
        committed(10),
        committed(20),
        Pinned(checkpoint=ref(10), at=1.0),
        ended(),
        claimed(2),
        Quarantined(checkpoint=ref(10), attempt=2, reason="I say so", at=1.0),
        finished(),
    )
    assert [c.step for c in state.stored] == [20]
    assert orphans(RUN, state, data(committed(10), committed(20))) == ()


# what belongs to no run

UUID = "0badcafe-0000-4000-8000-00000badcafe"
PROBES = [f"probe/{UUID}/0", f"probe/doctor-{UUID}/speed/1", "probe/0badcafe0badcafe/granted"]
FOREIGN = ["probe/mars-2020/image.tif", "probe/granted"]
CONTENT = f"content/{'0' * 64}/data/0badcafe/{'f' * 64}"


def test_probes_terms_and_uploads_go_when_old_by_the_stores_clock_and_the_newest_term_stays() -> None:
    now = 1e6
    aged = {"old": now - ABANDONED_S, "new": now - GRACE_S + 1}
    inventory = sort_out(
        [
            *(ObjectInfo(key, 64, aged["old"]) for key in PROBES),
            ObjectInfo(f"probe/{UUID}/1", 64, aged["new"]),
            *(ObjectInfo(key, 9, aged["old"]) for key in FOREIGN),
            *(ObjectInfo(layout.term("cat", n), 9, aged["old"]) for n in (2, 3, 4)),
            ObjectInfo(layout.term("dog", 0), 9, aged["old"]),
            ObjectInfo(layout.sweep_spec("cat"), 9, aged["old"]),
            ObjectInfo("holiday.jpg", 9, aged["old"]),
        ],
        [
            ObjectInfo(CONTENT, 0, aged["old"]),
            ObjectInfo(f"{CONTENT}0", 0, aged["new"]),
            *(ObjectInfo(key, 0, aged["old"]) for key in (*FOREIGN, "r", "backups/db")),
        ],
    )

    gone = [[info.key for info in infos] for infos in leftovers(inventory, now)]

    assert gone == [PROBES, [layout.term("cat", 2), layout.term("cat", 3)], [CONTENT]]
    assert leftovers(inventory, None) == ((), (), ())
    assert [info.key for info in inventory.unknown] == [*FOREIGN, "holiday.jpg"]


class Uploads(MemoryStore):
    """A store with unfinished uploads, as a bucket has them."""

    def __init__(self, *uploads: ObjectInfo) -> None:
        super().__init__()
        self.uploads = list(uploads)

    def unfinished(self, prefix: str) -> Iterator[ObjectInfo]:
        return (info for info in list(self.uploads) if info.key.startswith(prefix))

    def abort_uploads(self, prefix: str) -> int:
        before, self.uploads = self.uploads, [i for i in self.uploads if not i.key.startswith(prefix)]
        return len(before) - len(self.uploads)


@pytest.mark.parametrize("fresh", ["the same key", "a longer key"])
def test_a_fresh_upload_never_ends_with_an_old_one(fresh: str) -> None:
    old = [ObjectInfo(CONTENT, 0, 1.0), ObjectInfo(PROBES[0], 0, 1.0)]
    begun = ObjectInfo(CONTENT if fresh == "the same key" else f"{CONTENT}0", 0, 2.0)
    store = Uploads(*old, begun)
    assert [part.objects for part in collect_uploads(store, old)] == [0, 1]
    assert [(info.key, info.modified_s) for info in store.uploads] == [(CONTENT, 1.0), (begun.key, 2.0)]
    store.uploads = [info for info in store.uploads if info.modified_s != begun.modified_s]
    assert [part.objects for part in collect_uploads(store, old)] == [1, 0]
    assert store.uploads == []


# any history

STEPS = st.lists(st.integers(1, 30), unique=True, min_size=1, max_size=12).map(sorted)


@given(
    STEPS,
    st.integers(1, 4),
    st.sets(st.integers(0, 11)),
    st.sets(st.integers(0, 11)),
    st.booleans(),
    st.integers(1, 5),
)
def test_no_plan_ever_takes_what_must_stay(
    steps: list[int], last: int, pins: set[int], quarantines: set[int], over: bool, attempts: int
) -> None:
    records: list[Record] = [claimed()]
    attempt = 1
    for n, step in enumerate(steps):
        if attempt < attempts and n % 2:
            records += [ended(attempt), claimed(attempt + 1)]
            attempt += 1
        records.append(committed(step, attempt, metrics={"loss": step % 7}))
        if n in pins:
            records.append(Pinned(checkpoint=ref(step, attempt), at=1.0))
        elif n in quarantines and n + 1 < len(steps):
            records.append(Quarantined(checkpoint=ref(step, attempt), reason="rot", at=1.0))
    records += [finished()] if over else []
    state, entries = history(*records)
    objects = RunObjects(data=data(*(r for r in records if isinstance(r, Committed))))
    keep = Keep(last=last, metric="loss")

    plan = plan_run(RUN, objects, state, entries, keep=keep, grace_s=0.0, now_s=None)

    retire = [d.checkpoint.ref for d in plan.retire]
    assert not set(retire) & set(state.pinned)
    assert not set(retire) & plan.kept.keys()
    assert set(retire) | plan.kept.keys() == {c.ref for c in state.stored}
    newest = [c.ref for c in state.checkpoints[-max(last, 1 if over else 2) :]]
    assert not set(retire) & set(newest)
    needed = {info.key for info in data(*state.stored)}
    assert not needed & {info.key for info in plan.orphans}
    if retire:
        _, again = history(*records, retired(*retire))  # the log admits it
        assert again


# carrying it out


@pytest.fixture
def disk() -> Iterator[Path]:
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=shm) as directory:
        yield Path(directory)


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


# shared content


class Timed(MemoryStore):
    """Says of every object that it was written at 1000."""

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        for info in super().list(prefix, after):
            yield ObjectInfo(info.key, info.size_bytes, 1000.0)


def shared(store: ObjectStore, folder: Path) -> str:
    """A dataset that sweep cat uses, submitted; returns its digest."""
    folder.mkdir()
    (folder / "a.png").write_bytes(b"an image")
    local = hashed("", {"a.png": folder / "a.png"})
    store_for(store, "cat", local, submitted=False)
    store.put(layout.sweep_spec("cat"), b"{}")
    return local.digest


def collect_contents(store: ObjectStore, now_s: float | None) -> tuple[int, int]:
    """What one ``gc`` retires and how many objects it deletes."""
    done = Collected()
    for plan in plan_contents(store, take(store).contents, now_s):
        for part in collect_content(store, plan):
            done.add(part)
    assert (done.failed, done.denied) == ("", "")
    return done.retired, done.objects


def test_content_goes_in_two_phases_once_no_sweep_uses_it(tmp_path: Path) -> None:
    store = Timed()
    digest = shared(store, tmp_path / "data")
    assert collect_contents(store, 1e6) == (0, 0), "cat uses it"

    store.delete([layout.sweep_spec("cat")])
    assert collect_contents(store, None) == (0, 0), "no clock, no age"
    assert collect_contents(store, 1000 + GRACE_S - 1) == (0, 0), "a submission may be under way"
    assert collect_contents(store, 1000 + GRACE_S) == (1, 0)
    assert collect_contents(store, 1000 + GRACE_S - 1) == (0, 0), "the grace is not over"
    assert collect_contents(store, 1000 + GRACE_S) == (0, 2)
    assert collect_contents(store, 1e6) == (0, 0)
    assert [info.key for info in store.list(layout.content_data_prefix(digest))] == []


def test_an_upload_of_content_that_nobody_finished_goes_after_a_day(tmp_path: Path) -> None:
    store = Timed()
    store.put(layout.content_file("a" * 64, "0" * 8, "b" * 64), b"half")
    assert collect_contents(store, 1000 + ABANDONED_S - 1) == (0, 0)
    assert collect_contents(store, 1000 + ABANDONED_S) == (1, 0)
    assert collect_contents(store, 1000 + ABANDONED_S) == (0, 1)
    assert take(store).contents["a" * 64].data == {}
