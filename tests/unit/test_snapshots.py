"""Snapshots: they say exactly what the log said, and whatever becomes of them costs time and no more."""

import contextlib
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from functools import reduce

import pytest
import zstandard
from support.runs import RUN, claimed, committed, ended, finished, ref, retired

from storage import layout, snapshots
from storage.errors import (
    AccessDenied,
    Corrupt,
    Fenced,
    Unavailable,
)
from storage.log import (
    RunLog,
    RunSnapshot,
    Snapshot,
    run_log,
)
from storage.memory import MemoryStore
from storage.object_store import ObjectInfo, ObjectStore
from storage.records import (
    CancelRequested,
    EndReason,
    Entry,
    Pinned,
    Quarantined,
    Reaped,
    Record,
    Started,
    Unpinned,
)
from storage.run_state import RunState, fold, refusal
from storage.snapshots import (
    Known,
    decode,
    encode,
    hinted_log,
    read_run,
    read_sweep,
    write_run,
    write_sweep,
)

STARTED = Started(attempt=1, step=0, at=9.0)
HISTORY: tuple[Record, ...] = (claimed(), STARTED, committed(10), committed(20), retired(ref(10)))


class Counting(MemoryStore):
    """Counts requests, each page of a listing as one."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def get(self, key: str) -> bytes:
        self.asked.append(f"get {key.rpartition('/')[2]}")
        return super().get(key)

    def head(self, key: str) -> ObjectInfo | None:
        self.asked.append(f"head {key.rpartition('/')[2]}")
        return super().head(key)

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        self.asked.append("list")
        return super().list(prefix, after)

    def requests(self) -> Sequence[str]:
        """What was asked since this was last called."""
        told, self.asked = self.asked, []
        return told


def written(*records: Record) -> Counting:
    store = Counting()
    append(store, *records)
    return store


def append(store: ObjectStore, *records: Record) -> None:
    log = run_log(store, RUN)
    for record in records:
        log.append(record)


def key(n: int) -> str:
    return layout.log_entry(layout.run_log_prefix(RUN), n)


def snapshot_of(store: ObjectStore) -> RunSnapshot:
    log = run_log(store, RUN)
    log.refresh()
    snapshot = log.snapshot()
    assert snapshot is not None
    return snapshot


def begun_at(store: ObjectStore, snapshot: RunSnapshot) -> RunLog:
    log = run_log(store, RUN)
    log.adopt(snapshot)
    return log


def tried(state: RunState, kind: int, n: int, number: float) -> Record:
    """A record as some writer might try it, admitted or not."""
    attempt = max(1, state.attempt)
    chosen = state.stored[min(abs(n), len(state.stored) - 1)].ref if state.stored else ref(9)
    return (
        claimed(attempt + 1),
        Started(attempt=attempt, step=state.committed_step, at=number),
        committed(max(0, state.committed_step + n), attempt, metrics={"val/loss": number}, final=n == 3),
        committed(state.committed_step + 1, attempt).model_copy(update={"resumable": False}),
        ended(attempt, list(EndReason)[n]),
        retired(chosen),
        Reaped(checkpoints=tuple(c.ref for c in state.retired) or (chosen,), at=number),
        Quarantined(checkpoint=chosen, attempt=attempt if n > 0 else None, reason="sha256 'ü\n'", at=number),
        Pinned(checkpoint=chosen, at=number),
        Unpinned(checkpoint=chosen, at=number),
        CancelRequested(at=number) if n == 3 else committed(state.committed_step + 2, attempt),
    )[kind]


def random_history(seed: int) -> Iterator[tuple[Record, RunState]]:
    """Records that follow each other, some of them refused, each with the state after it."""
    chance = random.Random(seed)
    record: Record = claimed()
    state = RunState()
    for _ in range(chance.randint(1, 50)):
        state = fold(state, entry(record))
        yield record, state
        record = tried(state, chance.randrange(11), chance.randint(-1, 3), chance.expovariate(1e-3))
    if chance.random() < 0.3:
        yield finished(), fold(state, entry(finished()))


@pytest.mark.parametrize("seed", range(100))
def test_what_a_snapshot_restores_goes_on_as_the_whole_history(seed: int) -> None:
    records, states = zip(*random_history(seed), strict=True)
    assert run_of(records, RunState()) == states[-1]
    for at, state in enumerate(states):
        known = Known(
            snapshot=Snapshot(next_seq=at + 1, digest="0" * 64, state=state), tidy=bool(state.finished)
        )

        restored = decode(encode({RUN: known}))[RUN]

        assert restored == known
        assert run_of(records[at + 1 :], restored.snapshot.state) == states[-1]


def run_of(records: Sequence[Record], state: RunState) -> RunState:
    return reduce(fold, map(entry, records), state)


def test_the_histories_above_have_something_of_everything() -> None:
    seen: set[str] = set()
    for seed in range(100):
        before = RunState()
        for record, state in random_history(seed):
            if refusal(before, record) is None:
                seen.add(record.kind)
            before = state
    assert len(seen) == 11, seen


def entry(record: Record) -> Entry[Record]:
    return Entry(seq=0, nonce="0" * 32, prev="", record=record)


@pytest.mark.parametrize("behind", range(1, len(HISTORY) + 1))
def test_a_log_that_starts_from_a_snapshot_reads_only_what_came_after_it(behind: int) -> None:
    store = written(*HISTORY[:behind])
    snapshot = snapshot_of(store)
    append(store, *HISTORY[behind:])
    log = begun_at(store, snapshot)
    store.requests()

    log.refresh()

    assert store.requests() == ["list", *(f"get {n:012d}.json" for n in range(behind, len(HISTORY)))]
    assert log.next_seq == len(HISTORY)
    assert log.state == run_log(store, RUN).refresh()


def test_the_older_entries_are_read_when_somebody_asks_for_them() -> None:
    store = written(*HISTORY)
    log = begun_at(store, snapshot_of(store))
    log.refresh()

    assert [e.record for e in log.entries()] == list(HISTORY)
    store.requests()
    assert len(log.entries()) == len(HISTORY)
    assert store.requests() == [], "now they are known"


def test_a_log_that_keeps_no_entries_in_memory_reads_them_when_asked() -> None:
    store = written(*HISTORY)
    log = run_log(store, RUN, remember=False)
    log.refresh()

    assert [e.record for e in log.entries()] == list(HISTORY)


def test_a_snapshot_that_is_older_than_what_is_known_is_not_taken() -> None:
    store = written(*HISTORY[:3])
    old = snapshot_of(store)
    append(store, *HISTORY[3:])
    log = run_log(store, RUN)
    log.refresh()

    log.adopt(old)

    assert log.next_seq == len(HISTORY)


def replaced(store: MemoryStore, records: Sequence[Record]) -> None:
    """Another log takes the place of the one that is there."""
    store.delete([info.key for info in store.list(layout.run_log_prefix(RUN))])
    append(store, *records)


@pytest.mark.parametrize(
    "others",
    [
        (),
        (claimed(who="f" * 8),),
        (claimed(who="f" * 8), STARTED, ended(1), claimed(2, who="f" * 8), ended(2)),
        (claimed(who="f" * 8), STARTED, ended(1), claimed(2, who="f" * 8), ended(2), claimed(3), ended(3)),
    ],
    ids=["gone", "shorter", "as long", "longer"],
)
def test_a_snapshot_of_another_log_is_dropped_before_anything_is_appended(
    others: Sequence[Record], caplog: pytest.LogCaptureFixture
) -> None:
    store = written(*HISTORY)
    snapshot = snapshot_of(store)
    replaced(store, others)
    log = begun_at(store, snapshot)

    log.refresh()
    with caplog.at_level(logging.WARNING), contextlib.suppress(Fenced):
        log.append(claimed(9))

    assert log.state == run_log(store, RUN).refresh(), "as if there had been no snapshot"
    assert log.state.checkpoints == ()
    assert len([m for m in caplog.messages if "does not follow from its snapshot" in m]) == 1


@pytest.mark.parametrize("others", [(), (claimed(who="f" * 8),), HISTORY[:4]])
def test_a_log_that_is_shorter_than_its_snapshot_says_is_noticed_by_reading_alone(
    others: Sequence[Record],
) -> None:
    store = written(*HISTORY)
    snapshot = snapshot_of(store)
    replaced(store, others)

    assert begun_at(store, snapshot).refresh() == run_log(store, RUN).refresh()


def test_an_append_to_a_log_known_from_a_snapshot_alone_looks_at_the_last_entry_first() -> None:
    store = written(*HISTORY)
    log = begun_at(store, snapshot_of(store))
    log.refresh()
    store.requests()

    log.append(committed(30))
    log.append(committed(40))

    assert store.requests() == [f"get {len(HISTORY) - 1:012d}.json"], "once"
    assert run_log(store, RUN).refresh().committed_step == 40


def test_a_log_that_is_damaged_behind_its_snapshot_is_corrupt_and_keeps_what_could_be_read() -> None:
    store = written(*HISTORY[:3])
    snapshot = snapshot_of(store)
    append(store, *HISTORY[3:])
    store.put(key(4), b"{")
    log = begun_at(store, snapshot)

    for _ in range(2):
        with pytest.raises(Corrupt, match=r"000000000004.json .*: not a record"):
            log.refresh()
    assert log.state.committed_step == 20
    assert len(log.entries()) == 4


def test_damage_before_the_snapshot_is_met_by_who_reads_from_the_beginning_only() -> None:
    store = written(*HISTORY)
    log = begun_at(store, snapshot_of(store))
    store.put(key(0), b"{")

    assert log.refresh().committed_step == 20
    with pytest.raises(Corrupt, match=r"000000000000.json"):
        log.entries()


class Away(Counting):
    """Does not answer the n-th ``get``."""

    fails_at = 0

    def get(self, key: str) -> bytes:
        self.fails_at -= 1
        if self.fails_at == 0:
            raise Unavailable("503")
        return super().get(key)


def test_while_a_log_is_read_again_its_last_known_state_stays() -> None:
    store = Away()
    append(store, *HISTORY)
    before = snapshot_of(store)
    log = begun_at(store, Snapshot(next_seq=5, digest="f" * 64, state=before.state))
    append(store, committed(30))
    store.fails_at = 3

    with pytest.raises(Unavailable):
        log.refresh()
    assert log.state == before.state
    assert log.refresh() == run_log(store, RUN).refresh()


# In the store.


def test_a_sweeps_snapshot_is_two_requests_however_many_runs_it_has() -> None:
    store = written(*HISTORY)
    known = {f"cat-{n}": Known(snapshot=snapshot_of(store), tidy=n % 2 == 0) for n in range(500)}
    write_sweep(store, "cat", known)
    store.requests()

    assert read_sweep(store, "cat") == known
    assert store.requests() == ["head snapshot.json.zst", "get snapshot.json.zst"]


def test_without_a_snapshot_nothing_is_known() -> None:
    assert read_sweep(MemoryStore(), "cat") == {}
    assert read_run(MemoryStore(), RUN) is None


def flipped(body: bytes, at: int) -> bytes:
    return body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]


def repacked(body: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """A snapshot with its digests right and its content changed."""
    header, _, packed = body.partition(b"\n")
    again = zstandard.ZstdCompressor().compress(change(zstandard.ZstdDecompressor().decompress(packed)))
    return b" ".join((*header.split(b" ")[:-1], snapshots._digest(again))) + b"\n" + again


def bomb(body: bytes) -> bytes:
    packed = zstandard.ZstdCompressor().compress(b"[" * 1000)
    claimed_size = packed[:5] + (1 << 40).to_bytes(8, "little")  # nobody packed so much
    return b" ".join((*snapshots._HEADER, snapshots._digest(claimed_size))) + b"\n" + claimed_size


@pytest.mark.parametrize(
    "damage",
    [
        lambda body: b"",
        lambda body: b"\n" * 9,
        lambda body: body[:-1],
        lambda body: body + b"x",
        lambda body: flipped(body, len(body) - 9),
        lambda body: flipped(body, 24),
        lambda body: body.replace(b"snapshot 1 ", b"snapshot 2 ", 1),
        lambda body: repacked(body, lambda json: json[:-1]),
        lambda body: repacked(body, lambda json: json.replace(b'"next_seq":5', b'"next_seq":0')),
        lambda body: repacked(body, lambda json: json.replace(b'"stalls"', b'"stools"')),
        lambda body: repacked(body, lambda json: b"[]"),
        bomb,
    ],
)
def test_a_snapshot_that_is_no_good_is_ignored_with_a_word(
    damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    store = written(*HISTORY)
    write_run(store, RUN, snapshot_of(store))
    place = layout.run_snapshot(RUN)
    store.put(place, damage(store.get(place)))

    with caplog.at_level(logging.WARNING):
        assert read_run(store, RUN) is None
    assert len(caplog.messages) == 1
    assert "ignored, logs are read instead" in caplog.messages[0]


def test_a_huge_snapshot_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    store = written(*HISTORY)
    write_run(store, RUN, snapshot_of(store))
    monkeypatch.setattr(snapshots, "MAX_STORED_BYTES", 10)
    store.requests()

    assert read_run(store, RUN) is None
    assert store.requests() == ["head snapshot.json.zst"]


def test_a_snapshot_that_nobody_would_read_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    store = written(*HISTORY)
    snapshot = snapshot_of(store)
    monkeypatch.setattr(snapshots, "MAX_JSON_BYTES", 10)
    with pytest.raises(ValueError, match="too many for a snapshot"):
        write_run(store, RUN, snapshot)


def test_what_another_version_folded_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    store = written(*HISTORY)
    snapshot = snapshot_of(store)
    with monkeypatch.context() as other:
        other.setattr(snapshots, "_HEADER", (*snapshots._HEADER[:-1], b"0123456789abcdef"))
        write_run(store, RUN, snapshot)

    assert read_run(store, RUN) is None


def test_another_runs_snapshot_is_not_used() -> None:
    store = written(*HISTORY)
    store.put(layout.run_snapshot(RUN), encode({"dog": Known(snapshot=snapshot_of(store))}))
    assert read_run(store, RUN) is None


def test_who_resumes_a_run_starts_from_its_own_snapshot() -> None:
    store = written(*HISTORY)
    write_run(store, RUN, snapshot_of(store))
    append(store, ended(), claimed(2))
    store.requests()

    log = hinted_log(store, RUN)
    assert log.refresh().attempt == 2
    assert store.requests() == [
        "head snapshot.json.zst",
        "get snapshot.json.zst",
        "list",
        "get 000000000005.json",
        "get 000000000006.json",
    ]
    log.refresh()
    assert store.requests() == ["list"], "it is looked for once"


class NoSnapshots(Counting):
    """Credentials that allow the log and nothing else."""

    def head(self, key: str) -> ObjectInfo | None:
        if key.endswith("zst"):
            raise AccessDenied("403")
        return super().head(key)


def test_a_snapshot_that_may_not_be_read_is_done_without() -> None:
    store = NoSnapshots()
    append(store, *HISTORY)
    assert hinted_log(store, RUN).refresh().committed_step == 20


class Forgetful(MemoryStore):
    """Loses its snapshots between two requests."""

    def get(self, key: str) -> bytes:
        if key.endswith("zst"):
            self.delete([key])
        return super().get(key)


def test_a_snapshot_that_goes_away_meanwhile_is_done_without() -> None:
    store = Forgetful()
    append(store, *HISTORY)
    write_run(store, RUN, snapshot_of(store))
    assert hinted_log(store, RUN).refresh().committed_step == 20


def test_a_false_state_that_its_log_does_not_follow_from_is_dropped_whatever_it_says() -> None:
    """Seeded: snapshots with another position, digest or state, over logs that went on or did not."""
    for seed in range(200):
        chance = random.Random(seed)
        store = written(*HISTORY)
        true = snapshot_of(store)
        lie = Snapshot(
            next_seq=chance.randint(1, 9),
            digest=chance.choice([true.digest, "f" * 64]),
            state=RunState(attempts=true.state.attempts, stalls=2),
        )
        if (lie.next_seq, lie.digest) == (true.next_seq, true.digest):
            continue  # that is what the checksum of a stored snapshot is for
        log = begun_at(store, lie)
        log.refresh()
        log.append(committed(30))
        assert log.state == run_log(store, RUN).refresh(), f"seed {seed}"
