"""Logs that start from a snapshot: they say exactly what the whole log says, whatever became of either."""

import contextlib
import logging
import random
from collections.abc import Iterator, Sequence
from functools import reduce

import pytest
from support.runs import RUN, claimed, committed, ended, finished, lived, ref, retired
from support.snapshots import HISTORY, STARTED, Counting, key, snapshot_of, written

from storage import layout
from storage.errors import Corrupt, Fenced, Unavailable
from storage.log import RunLog, RunSnapshot, Snapshot, run_log
from storage.memory import MemoryStore
from storage.object_store import ObjectStore
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
from storage.snapshots import Known, decode, encode


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
    lived(store, RUN, *HISTORY[behind:])
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
    lived(store, RUN, *HISTORY[3:])
    log = run_log(store, RUN)
    log.refresh()

    log.adopt(old)

    assert log.next_seq == len(HISTORY)


def replaced(store: MemoryStore, records: Sequence[Record]) -> None:
    """Another log takes the place of the one that is there."""
    store.delete([info.key for info in store.list(layout.run_log_prefix(RUN))])
    lived(store, RUN, *records)


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
    lived(store, RUN, *HISTORY[3:])
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
    lived(store, RUN, *HISTORY)
    before = snapshot_of(store)
    log = begun_at(store, Snapshot(next_seq=5, digest="f" * 64, state=before.state))
    lived(store, RUN, committed(30))
    store.fails_at = 3

    with pytest.raises(Unavailable):
        log.refresh()
    assert log.state == before.state
    assert log.refresh() == run_log(store, RUN).refresh()


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
