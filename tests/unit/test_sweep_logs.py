"""What commands read of a sweep: from its snapshot on, in parallel, and of damaged logs what can be told."""

from collections.abc import Iterator

import pytest
from support.fake_cluster import FakeCluster, run_to_end, small_sweep
from support.runs import claimed

from orchestrator.control.controller import Controller
from orchestrator.reports.sweep_logs import LOOKS_AT_ONCE, SweepLogs
from orchestrator.reports.view import Status, read_rows, read_states
from orchestrator.reports.watch import Watcher
from storage import layout
from storage.errors import Corrupt, Unavailable
from storage.log import run_log
from storage.memory import MemoryStore
from storage.object_store import ObjectInfo


class Listings(MemoryStore):
    """Tells which logs were listed."""

    def __init__(self) -> None:
        super().__init__()
        self.listed: list[str] = []

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        self.listed.append(prefix)
        return super().list(prefix, after)


def finished_sweep(store: MemoryStore, runs: int = 3):  # type: ignore[no-untyped-def]
    sweep = small_sweep(runs=runs, max_steps=3)
    cluster = FakeCluster(store, sweep)
    for _ in run_to_end(Controller(sweep, store, cluster, cluster.clock), cluster):
        pass
    return sweep


def test_runs_that_a_snapshot_says_are_over_are_not_asked_again() -> None:
    store = Listings()
    sweep = finished_sweep(store)
    store.listed.clear()

    rows = read_rows(sweep, store)

    assert [row.status for row in rows] == [Status.SUCCEEDED] * 3
    assert store.listed == []
    store.delete([layout.sweep_snapshot(sweep.name)])
    assert read_rows(sweep, store) == rows, "nor is anything else told without it"


def test_a_look_reads_all_once_and_then_each_in_its_turn() -> None:
    store, sweep = Listings(), small_sweep(runs=LOOKS_AT_ONCE + 20)
    logs = SweepLogs(sweep, store)
    prefixes = {layout.run_log_prefix(run.run_id) for run in sweep.runs}

    logs.look()
    assert sorted(store.listed) == sorted(prefixes)

    store.listed.clear()
    logs.look()
    assert len(store.listed) == LOOKS_AT_ONCE
    logs.look()
    assert set(store.listed) == prefixes


def test_a_damaged_log_is_shown_as_a_failed_run_with_what_is_known_of_it() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=2)
    first, second = (run.run_id for run in sweep.runs)
    run_log(store, first).append(claimed())
    store.put(layout.log_entry(layout.run_log_prefix(first), 1), b"{")
    run_log(store, second).append(claimed())

    for rows in (read_rows(sweep, store), Watcher(sweep, store).look()):
        assert [row.status for row in rows] == [Status.FAILED, Status.STARTING]
        assert rows[0].attempts == 1
        assert "its log is damaged: runs/cat-0-00000000/log/000000000001.json" in rows[0].detail
    with pytest.raises(Corrupt, match="000000000001"):
        read_states(sweep, store)


def test_a_log_that_is_repaired_is_shown_as_it_is() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=1)
    key = layout.log_entry(layout.run_log_prefix(sweep.runs[0].run_id), 0)
    store.put(key, b"{")
    watcher = Watcher(sweep, store)
    assert [row.status for row in watcher.look()] == [Status.FAILED]

    store.delete([key])

    assert [row.status for row in watcher.look()] == [Status.PENDING]


class Away(MemoryStore):
    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        raise Unavailable("503")


def test_a_store_that_is_away_is_an_error_where_the_answer_would_be_wrong() -> None:
    with pytest.raises(Unavailable):
        read_rows(small_sweep(), Away())
