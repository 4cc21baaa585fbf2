"""The counts by which storms and rows are judged can tell when something is wrong."""

from support.evidence import litter, zombie_commits

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
