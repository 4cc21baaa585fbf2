"""What ``RayCluster`` makes of what Ray says: over a made-up Ray, for clusters that no test can have."""

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError

from orchestrator.control.cluster import Health, Slot
from orchestrator.grid.schema import Resources
from orchestrator.on_ray import ray_cluster
from orchestrator.on_ray.agent import NAMESPACE, AgentSetup, Report
from orchestrator.on_ray.ray_cluster import (
    NODES_EVERY_S,
    REMEMBER_S,
    REPORT_WAIT_S,
    VERDICT_S,
    RayCluster,
    openings,
)

ONE_CPU = Resources(cpus=1, gpus=0)


def id_of(number: int) -> str:
    return f"{number + 1:056x}"


def node(number: int, cpus: float = 1.0, *, alive: bool = True) -> dict[str, Any]:
    return {
        "NodeID": id_of(number),
        "NodeName": f"n{number}",
        "NodeManagerAddress": "10.0.0.1",
        "Resources": {"CPU": cpus},
        "Alive": alive,
    }


class FakeRay:
    """Agents answer at once with what ``answers`` has for them, else that they are there and idle."""

    def __init__(self, nodes: Iterable[dict[str, Any]]) -> None:
        self.now = 100.0
        self.there = list(nodes)
        self.draining: frozenset[str] = frozenset()
        self.actors: dict[str, str] = {}
        self.answers: dict[str, Exception] = {}
        self.mute = False
        self.asked = {"nodes": 0, "draining": 0}
        self.util = SimpleNamespace(list_named_actors=self._list_named_actors)

    def clock(self) -> float:
        return self.now

    def nodes(self) -> list[dict[str, Any]]:
        self.asked["nodes"] += 1
        return [dict(node) for node in self.there]

    def drained(self) -> frozenset[str]:
        self.asked["draining"] += 1
        return self.draining

    def remote(self, _: type) -> Any:
        return SimpleNamespace(options=self._create)

    def _create(self, *, name: str, scheduling_strategy: Any, **_: Any) -> Any:
        self.actors[name] = scheduling_strategy.node_id
        return SimpleNamespace(remote=lambda setup: self.get_actor(name, ""))

    def get_actor(self, name: str, namespace: str) -> Any:
        return SimpleNamespace(
            report=SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *_: name))
        )

    def _list_named_actors(self, *, all_namespaces: bool) -> list[dict[str, str]]:
        return [{"name": name, "namespace": NAMESPACE} for name in self.actors]

    def wait(self, refs: list[str], *, num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        ready = [ref for ref in refs if ref in self.answers or not self.mute]
        return ready[:num_returns], []

    def get(self, ref: str) -> Report:
        if ref in self.answers:
            raise self.answers[ref]
        return Report(version=1, node_id=self.actors[ref], up_since=1.0, work=None)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay([node(1), node(2)])
    monkeypatch.setattr(ray_cluster, "ray", fake)
    monkeypatch.setattr(ray_cluster, "draining", fake.drained)
    return fake


def cluster_on(ray: FakeRay, resources: Resources = ONE_CPU) -> RayCluster:
    def setup(name: str) -> AgentSetup:
        return None  # type: ignore[return-value]  # nobody looks at it

    return RayCluster("cat", resources, setup, clock=ray.clock)


def look(cluster: RayCluster, ray: FakeRay, seconds: float = NODES_EVERY_S) -> dict[str, Slot]:
    """The oldest slot of each node, after so long."""
    ray.now += seconds
    return {slot.node: slot for slot in reversed(cluster.observe())}


def test_the_agents_of_very_many_nodes_are_counted_once_and_nothing_is_asked_in_vain(ray: FakeRay) -> None:
    ray.there = [node(n) for n in range(1000)]
    cluster = cluster_on(ray, Resources(cpus=1, gpus=0, max_concurrent=10))
    looked = []
    cluster.unused = lambda: looked.append(1) or frozenset()  # type: ignore[func-returns-value]
    cluster.observe()
    assert len(ray.actors) == 10
    ray.asked = {"nodes": 0, "draining": 0}
    looked.clear()

    look(cluster, ray)

    assert len(ray.actors) == 10
    assert ray.asked == {"nodes": 1, "draining": 0}, "no node gets anything, so nobody asks what it may get"
    assert len(looked) == 1


def test_agents_open_where_there_is_room_and_not_on_nodes_that_ray_drains(ray: FakeRay) -> None:
    ray.there = [node(1, 2.0), node(2, 4.0), node(3, 1.0, alive=False)]
    ray.draining = frozenset({id_of(1)})
    cluster = cluster_on(ray)

    cluster.observe()

    assert sorted(ray.actors.values()) == [id_of(2)] * 4
    assert ray.asked["draining"] == 1


def test_no_more_agents_are_opened_than_the_limit_leaves_room_for() -> None:
    nodes = [node(1, 2.0), node(2, 4.0)]

    def ids(here: dict[str | None, int], room: int | None) -> list[str]:
        return [found["NodeID"] for found in openings(nodes, here, ONE_CPU, room)]

    assert ids({}, None) == [id_of(1)] * 2 + [id_of(2)] * 4
    assert ids({id_of(1): 1, id_of(2): 5}, None) == [id_of(1)]
    assert ids({}, 3) == [id_of(1), id_of(1), id_of(2)]
    assert ids({}, 0) == ids({}, -1) == []


def test_very_many_deaths_at_once_ask_ray_once_which_nodes_live(ray: FakeRay) -> None:
    ray.there = [node(n) for n in range(50)]
    cluster = cluster_on(ray)
    look(cluster, ray)
    ray.there = [node(n, alive=False) for n in range(50)]
    ray.answers = {name: ActorDiedError() for name in ray.actors}
    ray.asked["nodes"] = 0

    slots = look(cluster, ray, 0.0)

    assert {(slot.health, slot.node_lost) for slot in slots.values()} == {(Health.GONE, True)}
    assert ray.asked["nodes"] == 1


def test_an_agent_that_dies_a_moment_before_its_node_died_with_it(ray: FakeRay) -> None:
    cluster = cluster_on(ray)
    look(cluster, ray)
    ray.answers = {name: ActorDiedError() for name in ray.actors}

    slots = look(cluster, ray)
    assert {slot.health for slot in slots.values()} == {Health.UNKNOWN}, "no verdict yet"
    ray.there = [node(1, alive=False), node(2)]
    slots = look(cluster, ray)
    assert (slots["n1"].health, slots["n1"].node_lost) == (Health.GONE, True)
    assert slots["n2"].health is Health.UNKNOWN

    slots = look(cluster, ray, VERDICT_S)
    assert (slots["n2"].health, slots["n2"].node_lost) == (Health.GONE, False)


def test_where_ray_says_why_an_agent_died_nobody_waits(ray: FakeRay) -> None:
    cluster = cluster_on(ray)
    look(cluster, ray)
    ray.answers = {name: OutOfMemoryError("too much") for name in ray.actors}

    assert {(slot.health, slot.out_of_memory) for slot in look(cluster, ray).values()} == {
        (Health.GONE, True)
    }


def test_the_log_says_why_an_agent_could_not_start(ray: FakeRay, caplog: pytest.LogCaptureFixture) -> None:
    cluster = cluster_on(ray)
    cluster.observe()
    cause = RayTaskError(
        "Agent.__init__",
        "Traceback:\n  File x\nAccessDenied: no right to list",
        ValueError("x"),
        actor_id="a",
    )
    ray.answers = {name: ActorDiedError(cause) for name in ray.actors}
    look(cluster, ray)
    look(cluster, ray, VERDICT_S)
    assert "is gone: AccessDenied: no right to list" in caplog.text


def test_an_adopted_agent_has_a_node_before_it_was_heard_of(ray: FakeRay) -> None:
    look(cluster_on(ray), ray)
    ray.mute = True
    successor = cluster_on(ray)

    assert {slot.health for slot in look(successor, ray).values()} == {Health.UNKNOWN}
    ray.there = [node(1, alive=False), node(2)]
    ray.answers = {name: ActorDiedError() for name in ray.actors}
    slots = look(successor, ray)

    assert slots.keys() == {"n1", "n2"}
    assert slots["n1"].node_lost
    assert not slots["n2"].node_lost


def test_who_is_long_dead_is_forgotten_unless_a_run_counts_on_it(ray: FakeRay) -> None:
    cluster = cluster_on(ray)
    slots = look(cluster, ray)
    ray.there = [node(1, alive=False), node(2, alive=False)]
    ray.answers = {name: ActorDiedError() for name in ray.actors}
    look(cluster, ray)
    cluster.unused = lambda: {slots["n1"].slot}

    assert look(cluster, ray, REMEMBER_S - 2 * NODES_EVERY_S).keys() == {"n1", "n2"}
    assert look(cluster, ray, 4 * NODES_EVERY_S).keys() == {"n2"}


def test_an_agent_that_never_came_up_is_no_slot(ray: FakeRay) -> None:
    ray.mute = True
    cluster = cluster_on(ray)
    look(cluster, ray)
    assert len(ray.actors) == 2
    ray.answers = {name: ActorDiedError() for name in ray.actors}

    for _ in range(10):
        assert look(cluster, ray, 3 * REPORT_WAIT_S) == {}
        ray.answers |= {name: ActorDiedError() for name in ray.actors}

    assert len(cluster._members) <= 4
