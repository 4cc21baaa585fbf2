"""The counts by which storms and rows are judged can tell when something is wrong."""

from dataclasses import replace

from support.evidence import litter, zombie_commits
from support.rows import RowResult, summary

from storage import layout
from storage.memory import MemoryStore
from storage.records import Claimed, Committed, Entry, Record, RunEntry, StoredFile
from storage.run_state import RunState


def claimed(attempt: int) -> Claimed:
    return Claimed(attempt=attempt, incarnation=f"{attempt:08x}", node="n1", slot="s1", at=1.0)


def committed(attempt: int, step: int) -> Committed:
    file = StoredFile(name="adapter.safetensors", size_bytes=1, sha256="0" * 64)
    return Committed(attempt=attempt, incarnation=f"{attempt:08x}", step=step, files=(file,), at=1.0)


def entries(*records: Record) -> list[RunEntry]:
    return [Entry(seq=seq, nonce="0" * 32, prev="", record=record) for seq, record in enumerate(records)]


def test_a_commit_after_a_newer_claim_is_a_zombies() -> None:
    calm = entries(claimed(1), committed(1, 5), claimed(2), committed(2, 5))
    assert zombie_commits(calm) == 0
    assert zombie_commits([*calm, *entries(committed(1, 10))]) == 1


def test_data_that_no_record_names_is_litter() -> None:
    store, known = MemoryStore(), committed(1, 5)
    kept = layout.committed_file("run", known, "adapter.safetensors")
    left = layout.checkpoint_file("run", 1, "00000001", 10, "adapter.safetensors")
    for key in (kept, left):
        store.put(key, b"x")
    assert litter(store, "run", RunState(checkpoints=(known,))) == [left]


def test_the_rows_of_two_profiles_are_kept_apart_and_one_that_never_ended_does_not_hold() -> None:
    row = RowResult(
        fault="node killed",
        profile="fast",
        recovered=True,
        restarts=1,
        lost_steps=1,
        detect_s=2.0,
        again_s=3.0,
        zombie_commits=0,
        needless_restarts=0,
        left_behind=0,
    )
    both = [row, replace(row, profile="patient")]
    assert (summary(both, passed=True)["rows"], summary(both, passed=True)["holds"]) == (2, True)
    assert not summary(both, passed=False)["holds"]
    assert not summary([row, replace(row, left_behind=1)], passed=True)["holds"]
