"""What the controller asks of its store, and what becomes of it when that is away, slow or broken."""

import logging
import threading
from collections.abc import Iterator

import pytest
from support.fake_cluster import FakeCluster, run_to_end, small_sweep
from support.sweeps import (
    R0,
    R1,
    Counting,
    Outage,
    assert_well_ended,
    finish,
    state,
    ticks,
    under_way,
    wait_for,
)

from orchestrator.control.controller import REFRESH_S, Controller
from orchestrator.grid.schema import Checkpoint
from storage import layout
from storage.memory import MemoryStore
from storage.object_store import ObjectInfo
from storage.records import Outcome


@pytest.mark.parametrize("begins", [0, 1, 3, 6, 8])
def test_a_store_that_is_away_delays_the_controller_and_changes_nothing_else(
    begins: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.log.PAUSES_S", (0.0,) * 4)
    inner, sweep = MemoryStore(), small_sweep(runs=2)
    store, cluster = Outage(inner), FakeCluster(inner, sweep, nodes=1)
    controller = Controller(sweep, store, cluster, cluster.clock)

    for tick in run_to_end(controller, cluster):
        store.away = begins <= tick < begins + 15

    assert_well_ended(inner, sweep, cluster)
    assert [order.attempt for order in cluster.begun] == [1, 1]


def test_a_store_that_is_away_is_told_once_and_not_every_tick(caplog: pytest.LogCaptureFixture) -> None:
    inner, sweep = MemoryStore(), small_sweep(runs=1)
    store, cluster = Outage(inner), FakeCluster(inner, sweep)
    controller = Controller(sweep, store, cluster, cluster.clock)
    store.away = True

    with caplog.at_level(logging.WARNING, logger="orchestrator.control.controller"):
        ticks(controller, cluster, 20)
        store.away = False
        finish(controller, cluster)

    assert caplog.messages == ["the sweep's snapshot cannot be read: 503 SlowDown; trying again"]


def test_a_store_that_goes_away_is_told_once_a_run_and_not_every_tick(
    caplog: pytest.LogCaptureFixture,
) -> None:
    inner, sweep = MemoryStore(), small_sweep(runs=1)
    store, cluster = Outage(inner), FakeCluster(inner, sweep)
    controller = Controller(sweep, store, cluster, cluster.clock)

    with caplog.at_level(logging.WARNING, logger="orchestrator"):
        ticks(controller, cluster, 2)
        store.away = True
        ticks(controller, cluster, 20)
        store.away = False
        finish(controller, cluster)

    assert caplog.messages == [f"{R0}: Unavailable: 503 SlowDown; trying again"]


class Buggy(MemoryStore):
    """Raises, for one run, what no store should."""

    broken = ""

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        if self.broken and prefix.startswith(self.broken):
            raise ZeroDivisionError("a bug")
        return super().list(prefix, after)


def test_a_bug_that_one_run_meets_leaves_the_others_alone_and_is_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store, sweep = Buggy(), small_sweep(runs=3)
    store.broken = layout.run_prefix(R0)
    cluster, controller = under_way(store, sweep, 40)
    assert [s.outcome for s in controller.states.values()] == [None, *[Outcome.SUCCEEDED] * 2]
    (line,) = [line for line in caplog.records if "a bug" in line.getMessage()]
    assert line.exc_info, "where it happened is told too"
    store.broken = ""
    finish(controller, cluster)
    assert_well_ended(store, sweep, cluster)


class Slow(MemoryStore):
    """Does not answer about one run until it is let."""

    def __init__(self, slow: str) -> None:
        super().__init__()
        self._slow = layout.run_prefix(slow)
        self.asked = threading.Event()
        self.answers = threading.Event()
        self.answers.set()

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        if prefix.startswith(self._slow) and threading.current_thread() is not threading.main_thread():
            if not self.answers.is_set():
                self.asked.set()
            self.answers.wait()
        return super().list(prefix, after)


def test_a_run_whose_part_of_the_store_hangs_holds_up_no_other() -> None:
    store, sweep = Slow(R0), small_sweep(runs=2, max_steps=30)
    cluster, controller = under_way(store, sweep, 3, nodes=2)

    store.answers.clear()
    for _ in range(200):
        if state(store, R1).outcome:
            break
        ticks(controller, cluster, 1)
    assert store.asked.is_set()
    assert state(store, R1).outcome is Outcome.SUCCEEDED
    assert state(store, R0).outcome is None

    store.answers.set()
    wait_for(lambda: ticks(controller, cluster, 1) or controller.done)  # the thread that hung needs real time
    assert_well_ended(store, sweep, cluster)


def test_a_steady_tick_asks_the_store_for_nothing() -> None:
    store, sweep = Counting(), small_sweep(runs=6, max_steps=200)
    cluster, controller = under_way(store, sweep, 8, nodes=3, commit_every=100)
    cluster.now += REFRESH_S
    controller.tick()
    store.take()

    controller.tick()
    assert store.take() == []

    cluster.now += REFRESH_S
    controller.tick()
    running = [run_id for run_id, known in controller.states.items() if known.running]
    assert len(running) == 3
    assert store.take() == sorted(f"list {layout.run_log_prefix(run_id)}" for run_id in running)


def test_checkpoints_that_wait_for_their_grace_cost_no_request() -> None:
    store, sweep = Counting(), small_sweep(runs=1, max_steps=200, checkpoint=Checkpoint(grace_s=300.0))
    cluster, controller = under_way(store, sweep, 30)
    assert controller.states[R0].retired
    cluster.now += REFRESH_S
    controller.tick()
    store.take()
    controller.tick()
    assert store.take() == []


def test_very_many_runs_are_looked_at_less_often() -> None:
    runs = 150
    store, sweep = Counting(), small_sweep(runs=runs)
    cluster, controller = under_way(store, sweep, 0, nodes=0)
    controller.tick()
    store.take()

    for _ in range(2 * runs):
        cluster.now += 1.0
        controller.tick()

    looks = [asked for asked in store.take() if layout.drains_prefix(sweep.name) not in asked]
    assert runs <= len(looks) <= 2.1 * runs, "each about once in 150 seconds"
    assert len(set(looks)) == runs, "none is forgotten"
