"""``orchestrate events``: what all logs say, as one sequence of plain lines."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.fake_cluster import FakeCluster, small_sweep

from orchestrator.cli import main
from orchestrator.control.controller import Controller
from orchestrator.control.draining import drain_log, drain_record
from orchestrator.reports.events import EventReader, Happening, in_order, line
from storage import layout
from storage.directory import DirectoryStore
from storage.log import run_log
from storage.memory import MemoryStore
from storage.records import CancelRequested, Claimed, Entry, Finished, Outcome, Record, RunEntry

R0, R1 = "cat-0-00000000", "cat-1-00000001"


def entries(*records: Record) -> list[RunEntry]:
    return [Entry(seq=n, nonce="0" * 32, prev="", record=record) for n, record in enumerate(records)]


def claimed(attempt: int = 1, *, node: str = "n1", at: float = 0.0) -> Claimed:
    return Claimed(attempt=attempt, incarnation="0" * 8, node=node, slot=f"{node}/0", at=at)


def told(happenings: list[Happening]) -> list[str]:
    return [line(happening, at=lambda seconds: f"{seconds:g}") for happening in happenings]


def test_logs_are_told_in_time_order_and_none_loses_its_own_order_to_a_clock_that_is_slow() -> None:
    late = Finished(outcome=Outcome.SUCCEEDED, step=6, at=2.0)  # by a clock that is behind
    logs = {R0: entries(claimed(at=5.0), late), R1: entries(CancelRequested(at=3.0), claimed(at=7.0))}

    assert told(in_order(logs)) == [
        f"3  {R1}  cancelling was asked for",
        f"5  {R0}  attempt 1 placed on n1",
        f"5  {R0}  SUCCEEDED at step 6",
        f"7  {R1}  attempt 1 placed on n1",
    ]


def test_a_reader_tells_each_entry_once_and_knows_when_all_is_over() -> None:
    store, sweep = MemoryStore(), small_sweep()
    reader = EventReader(store, [R0, R1], sweep.name)
    assert reader.read() == []

    log, drains = run_log(store, R0), drain_log(store, sweep.name)
    log.append(claimed(at=1.0))
    drains.append(drain_record("n1", 120.0, at=2.0))
    assert told(reader.look()) == [
        f"1  {R0}  attempt 1 placed on n1",
        "2  cat  node n1 is to be left alone: attempts there get 120 s to end",
    ]
    assert (reader.look(), reader.over) == ([], False)

    for run_id in (R0, R1):
        run_log(store, run_id).append(Finished(outcome=Outcome.CANCELLED, at=3.0))
    drains.append(drain_record("n1", None, at=3.0))
    assert [happening.record.kind for happening in reader.look()] == ["finished", "finished", "drain_lifted"]
    assert reader.over


def test_a_damaged_log_is_told_up_to_the_damage() -> None:
    store = MemoryStore()
    run_log(store, R0).append(claimed())
    store.put(layout.log_entry(layout.run_log_prefix(R0), 1), b"{}")
    reader = EventReader(store, [R0])

    assert len(reader.read()) == 1
    assert "not a record" in reader.damaged[R0]
    assert reader.over


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    """A sweep of two runs that were trained to their ends."""
    store, sweep = DirectoryStore(tmp_path), small_sweep()
    store.create(layout.sweep_spec(sweep.name), sweep.to_json())
    cluster = FakeCluster(store, sweep)
    controller = Controller(sweep, store, cluster, clock=cluster.clock)
    while not controller.done:
        controller.tick()
        cluster.advance()
    return store


def test_the_command_tells_a_sweep_a_run_or_what_is_young(store: DirectoryStore) -> None:
    def events(*arguments: str) -> list[str]:
        result = CliRunner().invoke(main, ["events", *arguments, "--store", store.url])
        assert result.exit_code == 0, result.output
        return result.output.splitlines()

    both, one = events("cat"), events("cat/1", "-f")
    assert sum(R0 in text for text in both) > 3
    assert [text for text in both if R1 in text] == one
    assert one[0].endswith(f"{R1}  attempt 1 placed on n2")
    assert events("cat", "--since", "1h") == []  # the fake cluster lives in 1970
    first = json.loads(events("cat/1", "-o", "json")[0])
    assert (first["schema"], first["log"], first["seq"], first["kind"]) == (1, R1, 0, "claimed")
    assert first["text"] == "attempt 1 placed on n2"


def test_a_name_that_nothing_has_is_an_error(store: DirectoryStore) -> None:
    result = CliRunner().invoke(main, ["events", "dog", "--store", store.url])

    assert result.exit_code == 4
    assert "no sweep or run 'dog'" in result.output
