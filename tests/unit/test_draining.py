"""Draining a node: nothing new goes there, what trains there saves itself, and it holds for whoever comes."""

import pytest
from support.fake_cluster import FakeCluster, small_sweep

from orchestrator.control.controller import Controller
from orchestrator.control.draining import READ_EVERY_S, ask_to_drain, drain_log
from orchestrator.control.lifecycle import Exited, Policy, advance
from orchestrator.errors import OrchestrateError
from orchestrator.grid.schema import Recovery
from orchestrator.grid.sweep import Sweep
from storage import layout
from storage.drains import DrainAsked
from storage.errors import Unavailable
from storage.log import run_log
from storage.memory import MemoryStore
from storage.object_store import ObjectInfo
from storage.records import Claimed, Ended, EndReason
from storage.run_state import RunState, apply

R0, R1 = "cat-0-00000000", "cat-1-00000001"


def controller_of(sweep: Sweep, store: MemoryStore, cluster: FakeCluster) -> Controller:
    return Controller(sweep, store, cluster, clock=cluster.clock)


def ticks(controller: Controller, cluster: FakeCluster, number: int) -> None:
    for _ in range(number):
        controller.tick()
        cluster.advance()


def ends(store: MemoryStore, run_id: str) -> list[Ended]:
    log = run_log(store, run_id)
    log.refresh()
    return [entry.record for entry in log.entries() if isinstance(entry.record, Ended)]


def test_a_drained_node_gets_nothing_and_what_trained_there_goes_on_elsewhere() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=2, max_steps=40)
    cluster = FakeCluster(store, sweep, nodes=3)
    controller = controller_of(sweep, store, cluster)
    ticks(controller, cluster, 5)
    assert cluster.training(R0) == "n1/0"

    controller.drain("n1", 60.0)
    ticks(controller, cluster, 5)

    (end,) = ends(store, R0)
    assert (end.reason, end.exit_code) == (EndReason.DRAINED, 75)
    assert end.detail == "the trainer was asked to stop, because its node is drained, and saved its state"
    assert end.step == controller.states[R0].attempts[1].resumed_from, "no step is lost"
    assert sorted(cluster.busy()) == ["n2/0", "n3/0"]
    assert controller.states[R0].stalls == 0

    controller.drain("n2", 60.0)
    ticks(controller, cluster, 5)
    assert cluster.busy() == ["n3/0"], "the run of n2 waits: there is nowhere to go"

    controller.drain("n1", None)
    ticks(controller, cluster, 5)
    assert sorted(cluster.busy()) == ["n1/0", "n3/0"]


def test_a_drain_outlives_its_controller_and_the_node() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=1, max_steps=40)
    cluster = FakeCluster(store, sweep, nodes=2)
    first = controller_of(sweep, store, cluster)
    ticks(first, cluster, 3)
    first.drain("n1", 60.0)

    second = controller_of(sweep, store, cluster)
    ticks(second, cluster, 5)

    assert cluster.training(R0) == "n2/0"
    assert [end.reason for end in ends(store, R0)] == [EndReason.DRAINED]


def test_a_drain_that_is_asked_for_without_a_controller_is_seen_by_the_one_that_could_not_be_reached() -> (
    None
):
    store, sweep = MemoryStore(), small_sweep(runs=1, max_steps=200)
    cluster = FakeCluster(store, sweep, nodes=2)
    controller = controller_of(sweep, store, cluster)
    ticks(controller, cluster, 3)

    ask_to_drain(store, sweep.name, "n1", 60.0, None, atomic=True)
    cluster.now += READ_EVERY_S
    ticks(controller, cluster, 5)

    assert cluster.training(R0) == "n2/0"


def test_where_only_the_controller_may_write_nobody_else_drains() -> None:
    store = MemoryStore()

    with pytest.raises(OrchestrateError, match="only the controller may drain"):
        ask_to_drain(store, "cat", "n1", 60.0, None, atomic=False)

    assert list(store.list("")) == []


def test_the_same_drain_again_changes_nothing_and_another_time_to_save_does() -> None:
    log = drain_log(MemoryStore(), "cat")
    for grace_s in (60.0, 60.0, 5.0, 5.0):
        log.append(DrainAsked(node="n1", grace_s=grace_s, at=1.0))

    assert [entry.record.grace_s for entry in log.entries() if entry.record.kind == "drain_asked"] == [
        60.0,
        5.0,
    ]
    assert log.state.asked == (DrainAsked(node="n1", grace_s=5.0, at=1.0),)


class WithoutDrains(MemoryStore):
    """Does not answer when it is asked for drains."""

    away = True

    def list(self, prefix: str, after: str = "") -> "list[ObjectInfo]":  # type: ignore[override]
        if self.away and prefix == layout.drains_prefix("cat"):
            raise Unavailable("away")
        return list(super().list(prefix, after))


def test_nothing_is_placed_before_it_is_known_which_nodes_are_drained() -> None:
    store, sweep = WithoutDrains(), small_sweep(runs=1)
    cluster = FakeCluster(store, sweep, nodes=1)
    controller = controller_of(sweep, store, cluster)
    ticks(controller, cluster, 5)
    assert cluster.begun == []

    store.away = False
    ticks(controller, cluster, 5)
    assert len(cluster.begun) == 1


def test_a_damaged_log_of_drains_stops_no_sweep() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=1)
    drain_log(store, sweep.name).append(DrainAsked(node="n1", grace_s=60.0, at=1.0))
    store.put(layout.log_entry(layout.drains_prefix(sweep.name), 1), b"{}")
    cluster = FakeCluster(store, sweep, nodes=2)

    ticks(controller_of(sweep, store, cluster), cluster, 3)

    assert [order.run_id for order in cluster.begun] == [R0]
    assert cluster.training(R0) == "n2/0", "what could be read of it counts"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (75, EndReason.DRAINED),
        (-9, EndReason.DRAINED),
        (1, EndReason.APP_ERROR),
        (73, EndReason.DISK_FULL),
    ],
)
def test_a_drain_is_why_an_attempt_was_stopped_not_why_it_failed(code: int, reason: EndReason) -> None:
    state = apply(RunState(), Claimed(attempt=1, incarnation="0" * 8, node="n1", slot="n1/0", at=0.0))

    event = Exited(at=1.0, attempt=1, code=code, asked=True)
    records = advance(state, event, Policy())

    ended = records[0]
    assert isinstance(ended, Ended)
    assert ended.reason is reason


def test_a_drain_excuses_nobody_who_was_not_asked_to_stop() -> None:
    state = apply(RunState(), Claimed(attempt=1, incarnation="0" * 8, node="n1", slot="n1/0", at=0.0))

    (ended,) = advance(state, Exited(at=1.0, attempt=1, code=-9, drained=True), Policy())

    assert isinstance(ended, Ended)
    assert ended.reason is EndReason.KILLED


@pytest.mark.parametrize("then", ["lifted", "restarted"])
def test_whom_a_drain_ended_has_not_failed_though_the_drain_is_not_known_any_more(then: str) -> None:
    store = MemoryStore()
    sweep = small_sweep(runs=1, max_steps=40, recovery=Recovery(backoff_s=2.0, max_failures=1))
    cluster = FakeCluster(store, sweep, nodes=1, commit_every=50)
    controller = controller_of(sweep, store, cluster)
    ticks(controller, cluster, 4)

    controller.drain("n1", 0.0)
    controller.tick()
    if then == "lifted":
        controller.drain("n1", None)
    else:
        controller = controller_of(sweep, store, cluster)
    controller.tick()

    (end,) = ends(store, R0)
    assert (end.reason, end.exit_code) == (EndReason.DRAINED, -9)
    assert end.detail == "the trainer was asked to stop and did not save itself in time"
    assert controller.states[R0].finished is None
