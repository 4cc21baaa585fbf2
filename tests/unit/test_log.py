"""The log: contiguous, chained, fenced, and sure of its own appends when replies are lost."""

import json

import pytest
from support.flaky_store import Fault, FlakyStore
from support.runs import RUN, claimed, committed, ended, finished, ref, retired

from storage import layout
from storage.errors import Corrupt, Fenced, InvalidName, Unavailable
from storage.log import PAUSES_S, READ_AT_ONCE, RunLog, run_log
from storage.memory import MemoryStore
from storage.object_store import ObjectStore
from storage.records import MAX_RECORD_BYTES, Record, Started

STARTED = Started(attempt=1, step=0, at=9.0)


def key(n: int) -> str:
    return layout.log_entry(layout.run_log_prefix(RUN), n)


def log_of(store: ObjectStore, slept: list[float] | None = None) -> RunLog:
    return run_log(store, RUN, sleep=(slept if slept is not None else []).append)


def store_with(*records: Record) -> MemoryStore:
    store = MemoryStore()
    log = log_of(store)
    for record in records:
        log.append(record)
    return store


def records(store: ObjectStore) -> list[Record]:
    log = log_of(store)
    log.refresh()
    return [entry.record for entry in log.entries()]


def test_appended_records_are_read_by_others_in_order() -> None:
    store = store_with(claimed(), STARTED, committed(10))
    reader = log_of(store)

    state = reader.refresh()

    assert [entry.record for entry in reader.entries()] == [claimed(), STARTED, committed(10)]
    assert [entry.seq for entry in reader.entries()] == [0, 1, 2]
    assert reader.next_seq == 3
    assert state == reader.state
    assert (state.attempt, state.committed_step) == (1, 10)


def test_refreshing_reads_only_what_is_new() -> None:
    store = store_with(claimed(), STARTED)
    counting = FlakyStore(store, at=0, fault=Fault.REFUSE)
    reader = log_of(counting)
    reader.refresh()
    before = counting.calls

    reader.refresh()
    assert counting.calls == before + 1, "one listing finds that nothing is new"

    log_of(store).append(committed(10))
    assert reader.refresh().committed_step == 10
    assert counting.calls == before + 3


def test_a_writer_that_never_read_the_log_appends_at_its_end() -> None:
    store = store_with(claimed())
    assert log_of(store).append(committed(10)).committed_step == 10


def test_a_ghost_of_an_older_attempt_is_fenced() -> None:
    store = store_with(claimed())
    ghost = log_of(store)
    ghost.refresh()
    others = log_of(store)
    others.append(ended(1))
    others.append(claimed(2))

    with pytest.raises(Fenced, match="attempt 2 is the newest, attempt 1 is fenced"):
        ghost.append(committed(10))

    assert records(store) == [claimed(), ended(1), claimed(2)]
    assert ghost.state.attempt == 2, "it learned why"


def test_what_stale_knowledge_refuses_is_read_again_before_it_is_refused() -> None:
    store = store_with(claimed())
    stale = log_of(store)
    stale.refresh()
    log_of(store).append(ended(1))

    assert stale.append(claimed(2)).attempt == 2


def test_a_fact_that_the_log_holds_is_not_written_twice() -> None:
    store = store_with(claimed(), committed(10))
    again = committed(10).model_copy(update={"at": 99.0})

    assert log_of(store).append(again).committed_step == 10
    assert records(store) == [claimed(), committed(10)]


def test_a_taken_position_is_folded_and_the_next_one_tried() -> None:
    store = store_with(claimed())
    slow = log_of(store)
    slow.refresh()
    log_of(store).append(STARTED)

    slow.append(committed(10))

    assert records(store) == [claimed(), STARTED, committed(10)]


@pytest.mark.parametrize("fault", [Fault.LOSE_REPLY, Fault.REFUSE])
@pytest.mark.parametrize("at", range(1, 7))
def test_a_lost_reply_at_any_call_neither_loses_nor_repeats_the_record(fault: Fault, at: int) -> None:
    store = store_with(claimed(), STARTED)
    flaky = FlakyStore(store, at=at, fault=fault)
    log = log_of(flaky)

    for _ in range(2):
        try:
            log.append(committed(10))
            break
        except Unavailable:
            continue

    assert records(store) == [claimed(), STARTED, committed(10)]
    assert log.state.committed_step == 10


def test_a_lost_reply_is_recognised_within_one_append() -> None:
    store = store_with(claimed())
    calls_of_a_calm_append = 3  # list, get, create
    slept: list[float] = []
    log = log_of(FlakyStore(store, at=calls_of_a_calm_append, fault=Fault.LOSE_REPLY), slept)

    log.append(committed(10))

    assert records(store) == [claimed(), committed(10)]
    assert slept == [], "the entry was there: nothing to wait for"


class Silent(MemoryStore):
    """Reads, but never answers a write; ``lands`` says whether writes arrive all the same."""

    lands = False

    def create(self, key: str, body: bytes) -> bool:
        if self.lands:
            super().create(key, body)
        raise Unavailable("no answer")


def test_a_store_that_never_answers_is_given_up_on_after_a_few_tries() -> None:
    slept: list[float] = []
    with pytest.raises(Unavailable, match=r"no answer \(tried 5 times\)"):
        log_of(Silent(), slept).append(claimed())
    assert slept == list(PAUSES_S)


def test_an_append_that_was_given_up_on_but_arrived_is_found_by_the_next() -> None:
    class Blind(Silent):
        blind = True

        def head(self, key: str):  # type: ignore[no-untyped-def]
            if self.blind:
                raise Unavailable("no answer")
            return super().head(key)

    store = Blind()
    store.lands = True
    log = log_of(store)
    with pytest.raises(Unavailable):
        log.append(claimed())
    store.blind = False

    assert log.append(claimed()).attempt == 1
    assert records(store) == [claimed()]


def rewrite(store: MemoryStore, n: int, **changes: object) -> None:
    entry = json.loads(store.get(key(n)))
    store.put(key(n), json.dumps({**entry, **changes}).encode())


def test_a_replaced_entry_breaks_the_chain() -> None:
    store = store_with(claimed(), committed(10), committed(20))
    rewrite(store, 1, nonce="f" * 32)
    with pytest.raises(Corrupt, match=r"log/000000000002.json in memory://: does not follow"):
        log_of(store).refresh()


def test_an_entry_of_another_position_is_noticed() -> None:
    store = store_with(claimed(), committed(10))
    store.put(key(1), store.get(key(0)))
    with pytest.raises(Corrupt, match="says it is entry 0"):
        log_of(store).refresh()


def test_an_entry_far_away_is_not_believed_to_have_all_the_others_before_it() -> None:
    store = store_with(claimed())
    store.put(key(1_000_000), b"{}")
    counting = FlakyStore(store, at=0, fault=Fault.REFUSE)
    with pytest.raises(Corrupt, match=r"log/000000000001.json .*: the entry is missing"):
        log_of(counting).refresh()
    assert counting.calls < 2 * READ_AT_ONCE


def test_a_missing_entry_is_noticed_and_named() -> None:
    store = store_with(claimed(), committed(10), committed(20))
    store.delete([key(1)])
    with pytest.raises(Corrupt, match=r"log/000000000001.json .*: the entry is missing"):
        log_of(store).refresh()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"seq":0}',
        b'{"seq":0,"nonce":"' + b"0" * 32 + b'","prev":"","record":{"kind":"exploded"}}',
        b'{"seq":0,"nonce":"' + b"0" * 32 + b'","prev":"","record":{"kind":"cancel_requested","at":NaN}}',
    ],
)
def test_what_is_no_record_is_corrupt(body: bytes) -> None:
    store = MemoryStore()
    store.put(key(0), body)
    with pytest.raises(
        Corrupt, match=r"log/000000000000.json .*: not a record that this version understands"
    ):
        log_of(store).refresh()


def test_a_huge_object_is_refused_unread() -> None:
    store = MemoryStore()
    store.put(key(0), b" " * (MAX_RECORD_BYTES + 1))
    counting = FlakyStore(store, at=0, fault=Fault.REFUSE)
    with pytest.raises(Corrupt, match="too large for a record"):
        log_of(counting).refresh()
    assert counting.calls == 1


def test_a_record_that_no_reader_would_take_is_not_written() -> None:
    store = store_with(claimed())
    log = log_of(store)
    much = committed(10).model_copy(update={"metrics": {f"m{n:030d}": 1.0 for n in range(30_000)}})
    with pytest.raises(InvalidName, match=r"log/000000000001.json .*: committed takes \d+ bytes, a log has"):
        log.append(much)
    assert records(store) == [claimed()]
    assert log.append(committed(10)).committed_step == 10, "the log goes on"


def test_stray_objects_in_the_log_are_not_read() -> None:
    store = store_with(claimed())
    store.put(layout.run_log_prefix(RUN) + "notes.txt", b"?")
    assert log_of(store).refresh().attempt == 1


def test_retiring_the_newest_is_refused() -> None:
    store = store_with(claimed(), committed(10), committed(20))
    with pytest.raises(Fenced, match=r"retired is refused: step 20 \(attempt 1\) is the newest checkpoint"):
        log_of(store).append(retired(ref(20)))


def test_nothing_but_retiring_and_reaping_follows_the_end_of_a_run() -> None:
    store = store_with(claimed(), committed(10), committed(20), finished())
    log = log_of(store)
    for record in (committed(30), claimed(2), STARTED):
        with pytest.raises(Fenced, match="the run is over: SUCCEEDED"):
            log.append(record)
    assert [c.step for c in log.append(retired(ref(10))).checkpoints] == [20]
