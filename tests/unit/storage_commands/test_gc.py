"""``gc``: what it says, what it deletes and when, and what it leaves alone."""

import json
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
from support.cleaning import DAY_S, R0, R1, aged, keys, state
from support.command_line import Orchestrate
from support.flaky_store import Fault, FlakyStore
from support.runs import ref

from storage import layout
from storage.directory import DirectoryStore
from storage.errors import AccessDenied
from storage.log import run_log
from storage.object_store import ObjectStore
from storage.probe import ProbeResult
from storage.records import Claimed, Committed, Finished, Outcome, Pinned, Retired, StoredFile
from storage.snapshots import Known, write_sweep

FILE = StoredFile(name="adapter.safetensors", size_bytes=1, sha256="0" * 64)


def test_gc_says_what_it_would_do_and_does_nothing(store: DirectoryStore, orchestrate: Orchestrate) -> None:
    before = keys(store)

    code, printed, said = orchestrate("gc")

    assert code == 0
    lines = [line.split() for line in printed.splitlines()]
    # What attempt 2 resumed from, 20, stays; and of all the best is the last.
    assert lines[1][:5] == ["cat", "superseded", "checkpoints", "2", "4"]
    assert lines[2][:7] == ["cat", "uploads", "of", "fenced", "attempts", "1", "1.0"]
    assert "would delete 2 checkpoints" in printed
    assert "keep 3 checkpoints (1 resumed from, 1 keep_last, 1 newest)" in printed
    assert "Dry run" in said
    assert keys(store) == before


def test_gc_retires_deletes_what_nobody_can_want_and_later_the_rest(
    store: DirectoryStore, orchestrate: Orchestrate
) -> None:
    code, _, said = orchestrate("gc", "--apply")

    assert code == 0
    assert "deleted 1 object, 1.0 kB; retired 2" in said
    assert [c.step for c in state(store).retired] == [10, 30]
    assert len([key for key in keys(store) if "/data/" in key]) == 10

    assert "deleted 0 objects, 0 B; retired 0" in orchestrate("gc", "--apply")[2], "the grace is not over"
    aged(store, 301)
    assert "deleted 4 objects" in orchestrate("gc", "--apply")[2]
    assert state(store).retired == ()
    assert [c.step for c in state(store).checkpoints] == [20, 40, 50]

    aged(store, 3600)
    assert "deleted 1 object" in orchestrate("gc", "--apply")[2], "the probe's"
    code, printed, said = orchestrate("gc")
    assert (code, said) == (0, "")
    assert "nothing to delete; keep 3 checkpoints" in printed


def test_gc_keeps_what_is_pinned_whatever_it_is_asked(
    store: DirectoryStore, orchestrate: Orchestrate
) -> None:
    assert orchestrate("checkpoints", "pin", "cat/0@10")[:2] == (
        0,
        f"{R0}: step 10 is pinned, and stays until it is unpinned\n",
    )
    orchestrate("gc", "--apply", "--keep-last", "1")
    assert [c.step for c in state(store).retired] == [30]

    assert orchestrate("checkpoints", "unpin", "cat/0@10")[0] == 0
    orchestrate("gc", "--apply", "--keep-last", "1")
    assert [c.step for c in state(store).retired] == [30, 10]


def test_an_old_finished_sweep_keeps_the_newest_the_best_and_the_pinned(
    store: DirectoryStore, orchestrate: Orchestrate, tmp_path: Path
) -> None:
    log = run_log(store, R0)
    log.append(Pinned(checkpoint=ref(10), at=1.0))
    log.append(Finished(outcome=Outcome.FAILED, at=1.0))
    aged(store, 8 * DAY_S)
    orchestrate("gc", "--apply", "--older-than", "7d")
    assert [c.step for c in state(store).retired] == [20, 30], "the other run is not over: policy decides"

    run_log(store, R1).append(Finished(outcome=Outcome.CANCELLED, at=1.0))
    orchestrate("gc", "--apply", "--older-than", "7d")
    assert len(state(store).retired) == 2, "it ended just now, by the store's clock"

    aged(store, 8 * DAY_S)
    orchestrate("gc", "--apply", "--older-than", "7d")
    assert [c.step for c in state(store).checkpoints] == [10, 50]


def test_gc_as_json(store: DirectoryStore, orchestrate: Orchestrate) -> None:
    code, printed, _ = orchestrate("gc", "-o", "json")

    found = json.loads(printed)
    assert (code, found["schema"], found["applied"], found["done"]) == (0, 1, False, None)
    assert [(row["sweep"], row["kind"], row["checkpoints"], row["when"]) for row in found["plan"]] == [
        ("cat", "superseded checkpoints", 2, "later"),
        ("cat", "uploads of fenced attempts", 0, "now"),
    ]
    assert found["kept"] == {
        R0: {"20.a1": ["resumed from"], "40.a2": ["keep_last"], "50.a2": ["newest", "best"]}
    }

    applied = json.loads(orchestrate("gc", "--apply", "-o", "json")[1])
    assert (applied["applied"], applied["done"]["retired"], applied["done"]["objects"]) == (True, 2, 1)


def test_a_run_whose_log_is_damaged_is_left_alone(store: DirectoryStore, orchestrate: Orchestrate) -> None:
    store.put(layout.log_entry(layout.run_log_prefix(R0), 1), b"rot")
    before = keys(store)

    code, _, said = orchestrate("gc", "--apply")

    assert code == 0
    assert f"{R0} is left alone" in said
    assert keys(store) == before


def test_a_run_damaged_before_its_snapshot_or_beyond_any_key_is_left_alone_and_others_are_not(
    store: DirectoryStore, orchestrate: Orchestrate
) -> None:
    log = run_log(store, R0)
    log.refresh()
    log.append(Retired(checkpoints=(log.state.checkpoints[0].ref,), at=1.0))
    write_sweep(store, "cat", {R0: Known(snapshot=log.snapshot())})
    store.put(layout.log_entry(layout.run_log_prefix(R0), 1), b"rot")
    other = run_log(store, R1)
    other.append(Claimed(attempt=1, incarnation="0badcafe", node="n", slot="n/0", at=1.0))
    other.append(Committed(attempt=1, incarnation="0badcafe", step=10**9, files=(FILE,), at=1.0))
    before = keys(store)

    for command in (["gc", "--apply"], ["gc", "--apply", "--older-than", "1h"]):
        code, _, said = orchestrate(*command)
        assert code == 0
        assert f"{R0} is left alone" in said
        assert f"{R1} is left alone" in said
        assert [key for key in before if key not in keys(store)] == []
    assert orchestrate("du")[0] == 0


def test_a_snapshot_saves_reading_and_nothing_is_deleted_on_its_word(
    store: DirectoryStore, orchestrate: Orchestrate
) -> None:
    log = run_log(store, R0)
    log.refresh()
    wrong = replace(log.state, checkpoints=log.state.checkpoints[-1:])  # as if 10 to 40 had never been
    right, lie = (Known(snapshot=replace(log.snapshot(), state=said)) for said in (log.state, wrong))
    write_sweep(store, "cat", {R0: right})
    assert json.loads(orchestrate("gc", "-o", "json")[1])["requests"] == 12 - 8 + 2

    write_sweep(store, "cat", {R0: lie})
    assert "uploads of fenced attempts" in orchestrate("gc")[1]
    assert "deleted 1 object, 1.0 kB; retired 2" in orchestrate("gc", "--apply")[2]
    assert [c.step for c in state(store).checkpoints] == [20, 40, 50]


def test_a_store_that_refuses_to_delete_is_told_once(
    store: DirectoryStore, orchestrate: Orchestrate, monkeypatch: pytest.MonkeyPatch
) -> None:
    aged(store, 2 * DAY_S)

    def refuse(self: DirectoryStore, keys: object) -> None:
        for key in keys:  # type: ignore[attr-defined]
            if not key.startswith("probe/") or key == f"probe/{uuid.UUID(int=1)}/0":
                raise AccessDenied(f"{key}: no right to delete")

    monkeypatch.setattr(DirectoryStore, "delete", refuse)
    code, _, said = orchestrate("gc", "--apply")

    assert code == 5
    assert said.count("no right to delete") == 1
    assert "training is not affected" in said
    assert [c.step for c in state(store).retired] == [10, 30]


def test_a_store_that_goes_away_is_exit_6_and_the_next_gc_goes_on(
    store: DirectoryStore, orchestrate: Orchestrate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flaky(url: str) -> tuple[ObjectStore, ProbeResult]:
        return FlakyStore(store, 1, Fault.REFUSE), ProbeResult(True, "")

    with monkeypatch.context() as patch:
        patch.setattr("storage.probe.open_probed", flaky)
        code, _, said = orchestrate("gc", "--apply")
    assert code == 6
    assert "what is left, the next gc deletes" in said

    assert "deleted 1 object, 1.0 kB; retired 2" in orchestrate("gc", "--apply")[2]
