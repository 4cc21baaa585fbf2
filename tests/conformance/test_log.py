"""Logs on real stores: of any number of writers, exactly one wins each position."""

import contextlib
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from support.runs import RUN, claimed, committed, ended, ref, retired
from support.s3_servers import S3Server

from storage.errors import Fenced
from storage.log import run_log
from storage.object_store import ObjectStore
from storage.records import Record
from storage.run_state import RunState
from storage.url import open_store

WRITERS = 8
ROUNDS = 3

Append = Callable[[Record], RunState]


def race_claims(appends: list[Append], attempt: int) -> list[str]:
    """Let every writer claim the same attempt at once; return the incarnations of the admitted."""
    ready = threading.Barrier(len(appends))

    def claim(n: int) -> str | None:
        mine = claimed(attempt, f"{attempt:04x}{n:04x}")
        ready.wait()
        try:
            appends[n](mine)
        except Fenced:
            return None
        return mine.incarnation

    with ThreadPoolExecutor(len(appends)) as pool:
        return [winner for winner in pool.map(claim, range(len(appends))) if winner]


def assert_one_winner_each_round(store: ObjectStore, appends: list[Append]) -> None:
    for attempt in range(1, ROUNDS + 1):
        winners = race_claims(appends, attempt)
        state = run_log(store, RUN).refresh()
        assert state.running is not None
        assert winners == [state.running.claimed.incarnation]
        appends[0](ended(attempt))
    assert [a.number for a in run_log(store, RUN).refresh().attempts] == [1, 2, 3]


def test_of_eight_claims_at_once_exactly_one_wins(atomic_store: ObjectStore) -> None:
    assert_one_winner_each_round(atomic_store, [run_log(atomic_store, RUN).append for _ in range(WRITERS)])


def test_one_appender_makes_a_store_without_create_only_safe(rclone: S3Server) -> None:
    store = open_store(rclone.url_of("arbitrated"), check_then_put=True)
    arbiter = run_log(store, RUN)
    assert_one_winner_each_round(store, [arbiter.append] * WRITERS)


def test_records_of_many_writers_all_land_without_a_gap(atomic_store: ObjectStore) -> None:
    log = run_log(atomic_store, RUN)
    log.append(claimed())
    for step in range(1, 14):
        log.append(committed(step))

    def retire_some(steps: range) -> None:
        mine = run_log(atomic_store, RUN)
        for step in steps:
            mine.append(retired(ref(step)))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(retire_some, (range(n, n + 3) for n in range(1, 13, 3))))

    state = log.refresh()
    assert {c.step for c in state.retired} == set(range(1, 13))
    assert [c.step for c in state.checkpoints] == [13]
    assert [entry.seq for entry in log.entries()] == list(range(1 + 13 + 12))


def test_in_a_storm_of_writers_what_was_acknowledged_is_what_the_log_says(atomic_store: ObjectStore) -> None:
    """Nodes claim, commit, declare each other lost, and come back as ghosts, all at once."""

    def live(node: int) -> list[Record]:
        chance, log, acknowledged = random.Random(node), run_log(atomic_store, RUN), list[Record]()
        mine = claimed(1)  # at first a ghost of somebody else's attempt
        for _ in range(12):
            state = log.refresh()
            record: Record
            if state.running is None:
                record = mine = claimed(state.attempt + 1, f"{chance.getrandbits(32):08x}")
            elif chance.random() < 0.3:
                record = ended(state.attempt)
            else:
                record = committed(state.committed_step + 1, mine.attempt).model_copy(
                    update={"incarnation": mine.incarnation}
                )
            with contextlib.suppress(Fenced):
                log.append(record)
                acknowledged.append(record)
        return acknowledged

    with ThreadPoolExecutor(4) as pool:
        acknowledged = [record for records in pool.map(live, range(4)) for record in records]

    log = run_log(atomic_store, RUN)
    state = log.refresh()
    written = [entry.record for entry in log.entries()]
    assert sorted(map(repr, written)) == sorted(set(map(repr, acknowledged)))
    assert len(state.attempts) == sum(record.kind == "claimed" for record in written), "a claim was ignored"
    assert len(state.checkpoints) == sum(record.kind == "committed" for record in written)
    owners = {attempt.number: attempt.claimed.incarnation for attempt in state.attempts}
    assert all(owners[c.attempt] == c.incarnation for c in state.checkpoints)
