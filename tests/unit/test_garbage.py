"""What of a run may go and what may not, as plain values."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.runs import RUN, claimed, committed, ended, finished, incarnation, ref, retired

from storage import layout
from storage.garbage.inventory import RunObjects, sort_out
from storage.garbage.rules import Keep, orphans, plan_run
from storage.object_store import ObjectInfo
from storage.records import Committed, Entry, Pinned, Quarantined, Record, RunEntry, Started
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
