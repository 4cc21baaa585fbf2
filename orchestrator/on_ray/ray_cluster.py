"""The cluster as Ray sees it: nodes become slots, each slot an agent actor.

Agents are detached and named, so a controller that starts again finds them and adopts what they hold. A
report that fails with ``ActorUnavailableError`` makes a slot UNKNOWN; only ``ActorDiedError`` makes it GONE.
"""

import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnschedulableError, OutOfMemoryError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..control.cluster import Health, Listening, Order, Slot, Work
from ..grid.schema import Resources
from .agent import NAMESPACE, Agent, AgentSetup, Report, attempt_name
from .ray_drain import drain, draining

REPORT_WAIT_S = 2.0
"""An agent with nothing new answers after this long; silence is measured in multiples of it."""

NODES_EVERY_S = 1.0

LONGEST_PAUSE_S = 60.0
"""Between agents on a node where none of them comes up; doubled from 2 s."""

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Member:
    """One agent, as last heard of."""

    handle: Any
    name: str
    node_id: str | None
    """None until an adopted agent has said where it is."""
    node: str
    pending: Any = None
    report: Report | None = None
    up_since: float = 0.0
    heard_at: float = 0.0
    """In seconds of ``Listening``."""
    health: Health = Health.ALIVE
    node_lost: bool = False
    out_of_memory: bool = False
    preempted: bool = False
    adopted: bool = False


class RayCluster:
    """Implements ``cluster.Cluster`` on a Ray cluster that this process is connected to."""

    def __init__(
        self,
        sweep: str,
        resources: Resources,
        setup: Callable[[str], AgentSetup],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sweep = sweep
        self._prefix = f"lora/{sweep}/slot/"
        self._resources = resources
        self._setup = setup
        self._clock = clock
        self._listening = Listening(clock, REPORT_WAIT_S)
        self._members: dict[str, _Member] = {}
        self._nodes: list[dict[str, Any]] = []
        self._nodes_read_at = float("-inf")
        self._misfires: dict[str | None, int] = {}
        """Agents in a row that died on a node before they said a word."""
        self._no_agent_before: dict[str | None, float] = {}
        self._drained: set[str] = set()
        """Nodes that Ray was asked to drain, for a notice."""
        self.slots: tuple[Slot, ...] = ()
        self.unused: Callable[[], Collection[str]] = frozenset
        """Slots on which nothing is placed: they do not count where ``max_concurrent`` limits how many."""
        self._adopt()

    def observe(self) -> tuple[Slot, ...]:
        """Wait briefly for news, then return every slot."""
        self._listening.listen()
        self._refresh_nodes()
        self._ask()
        pending = {m.pending: m for m in self._members.values() if m.pending is not None}
        if pending:
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=0.5)
            if ready:  # take everything that is there, not only the first
                ready, _ = ray.wait(list(pending), num_returns=len(pending), timeout=0)
            for ref in ready:
                self._receive(pending[ref], ref)
        else:
            time.sleep(0.2)
        # An adopted agent counts before it was heard of: it may be training. A new one does not: it may never
        # get its place.
        self.slots = tuple(
            self._slot(m) for m in self._members.values() if m.report or m.adopted or m.health is Health.GONE
        )
        return self.slots

    def start(self, slot: str, order: Order) -> None:
        name = attempt_name(self._sweep, order)  # by which Ray's Tasks page shows it
        self._members[slot].handle.start.options(name=name).remote(order)

    def stop(self, slot: str, run_id: str, attempt: int, grace_s: float) -> None:
        self._members[slot].handle.stop.remote(run_id, attempt, grace_s)

    def close(self) -> None:
        """End every agent and what it runs."""
        members = [m for m in self._members.values() if m.health is not Health.GONE]
        closing = [m.handle.close.remote() for m in members]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=5.0)
        for member in members:
            ray.kill(member.handle)

    def _adopt(self) -> None:
        """Find the agents that an earlier controller of this sweep left."""
        for actor in ray.util.list_named_actors(all_namespaces=True):
            name = str(actor["name"])
            if actor["namespace"] == NAMESPACE and name.startswith(self._prefix):
                with contextlib.suppress(ValueError):  # it has died since it was listed
                    self._members[name] = _Member(
                        handle=ray.get_actor(name, namespace=NAMESPACE),
                        name=name,
                        node_id=None,
                        node="?",
                        heard_at=self._listening.seconds,
                        adopted=True,
                    )

    def _refresh_nodes(self) -> None:
        if self._clock() - self._nodes_read_at < NODES_EVERY_S:
            return
        self._nodes = ray.nodes()
        self._nodes_read_at = self._clock()
        if any(self._unplaced(m) for m in self._members.values()):
            return  # adopted agents first say where they are, or two would share a slot
        for node in self._nodes:
            if node["Alive"] and self._no_agent_before.get(node["NodeID"], 0.0) <= self._clock():
                self._fill(node)

    def _unplaced(self, member: _Member) -> bool:
        """An adopted agent that may still say where it is; one that stays silent holds up nobody."""
        silent_s = self._listening.seconds - member.heard_at
        return member.node_id is None and member.health is not Health.GONE and silent_s < 3 * REPORT_WAIT_S

    def _fill(self, node: dict[str, Any]) -> None:
        """Create the agents that a node has room for."""
        here = sum(
            m.node_id == node["NodeID"] and m.health is not Health.GONE for m in self._members.values()
        )
        unused = self.unused()
        everywhere = sum(m.health is not Health.GONE and m.name not in unused for m in self._members.values())
        wanted = slots_on(node["Resources"], self._resources) - here
        limit = self._resources.max_concurrent
        if wanted > 0 and node["NodeID"] in draining():
            return  # Ray would not let them come up
        for _ in range(wanted if limit is None else min(wanted, limit - everywhere)):
            self._create(node)

    def _create(self, node: dict[str, Any]) -> None:
        place = node_name(node)
        name = f"{self._prefix}{place}/{uuid.uuid4().hex[:6]}"
        handle = (
            ray.remote(Agent)
            .options(
                name=name,
                namespace=NAMESPACE,
                lifetime="detached",
                max_concurrency=8,
                num_cpus=self._resources.cpus,
                num_gpus=self._resources.gpus,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            )
            .remote(self._setup(name))
        )
        self._members[name] = _Member(
            handle=handle, name=name, node_id=node["NodeID"], node=place, heard_at=self._listening.seconds
        )

    def _ask(self) -> None:
        """Keep one report outstanding per agent."""
        for member in self._members.values():
            if member.pending is None and member.health is not Health.GONE:
                known = member.report.version if member.report else -1
                wait_s = REPORT_WAIT_S if member.report else 0.0
                work = member.report.work if member.report else None
                # Ray's Tasks page and the process list show what an agent is busy with by this name.
                name = attempt_name(self._sweep, work) if work and work.exit_code is None else member.name
                member.pending = member.handle.report.options(name=name).remote(known, wait_s)

    def _receive(self, member: _Member, ref: Any) -> None:
        member.pending = None
        try:
            report: Report = ray.get(ref)
        except (ActorDiedError, ActorUnschedulableError, OutOfMemoryError) as error:
            member.health = Health.GONE
            member.out_of_memory = isinstance(error, OutOfMemoryError)
            member.node_lost = not self._node_alive(member.node_id)
            # At first sight: asked again, Ray may have forgotten it.
            member.preempted = bool(getattr(error, "preempted", False))
            if member.report is None:
                self._misfires[member.node_id] = self._misfires.get(member.node_id, 0) + 1
                pause_s = min(2.0 ** self._misfires[member.node_id], LONGEST_PAUSE_S)
                self._no_agent_before[member.node_id] = self._clock() + pause_s
            with_node = ", with its node" if member.node_lost else ""
            logger.warning("%s is gone%s: %s", member.name, with_node, str(error).splitlines()[0])
        except RayError as error:
            if member.health is Health.ALIVE:
                logger.warning("%s cannot be reached: %s", member.name, type(error).__name__)
            member.health = Health.UNKNOWN
        else:
            self._misfires.pop(report.node_id, None)
            if report.unfit != (member.report.unfit if member.report else ""):
                said = f"gets no run: {report.unfit}" if report.unfit else "is fit to train again"
                logger.warning("%s on %s %s", member.name, member.node, said)
            member.report = report
            member.health = Health.ALIVE
            member.heard_at = self._listening.seconds
            member.node_id = report.node_id
            member.up_since = report.up_since
            self._heed(report)
            if member.node == "?":
                member.node = next(
                    (node_name(n) for n in self._nodes if n["NodeID"] == report.node_id), report.node_id[:8]
                )

    def _heed(self, report: Report) -> None:
        """Let Ray know, once, that a node is about to be taken away."""
        notice = report.notice
        if notice and notice.ends_node and not notice.withdrawn and report.node_id not in self._drained:
            self._drained.add(report.node_id)
            drain(report.node_id, str(notice), notice.left_s)

    def _node_alive(self, node_id: str | None) -> bool:
        return any(n["NodeID"] == node_id and n["Alive"] for n in ray.nodes())

    def _slot(self, member: _Member) -> Slot:
        silent_s = self._listening.seconds - member.heard_at
        unheard = member.report is None or silent_s > 3 * REPORT_WAIT_S
        work: Work | None = member.report.work if member.report else None
        notice = member.report.notice if member.report else None
        if notice and notice.left_s is not None:
            notice = replace(notice, left_s=notice.left_s - silent_s)
        return Slot(
            slot=member.name,
            node=member.node,
            up_since=member.up_since,
            health=Health.UNKNOWN if unheard and member.health is Health.ALIVE else member.health,
            silent_s=silent_s,
            node_lost=member.node_lost,
            out_of_memory=member.out_of_memory,
            preempted=member.preempted,
            notice=notice,
            unfit=member.report.unfit if member.report else "",
            work=work,
        )


def shortfall(want: Resources) -> str | None:
    """Say what the nodes of the connected cluster have, if none of them has room for a single run."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if any(slots_on(node["Resources"], want) for node in nodes):
        return None
    return "; ".join(
        f"{node_name(n)}: {n['Resources'].get('CPU', 0):g} CPUs, {n['Resources'].get('GPU', 0):g} GPUs"
        for n in nodes
    )


def machines() -> int:
    """How many machines the connected cluster spans."""
    return len({node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]})


def slots_on(have: dict[str, float], want: Resources) -> int:
    """Return how many training processes fit on a node with these Ray resources."""
    room = []
    if want.cpus:
        room.append(have.get("CPU", 0.0) // want.cpus)
    if want.gpus:
        room.append(have.get("GPU", 0.0) // want.gpus)
    return int(min(room, default=0.0))


def _described(have: dict[str, float]) -> str:
    return f"{have.get('CPU', 0):g} CPUs, {have.get('GPU', 0):g} GPUs"


def node_name(node: dict[str, Any]) -> str:
    """Return a short name that tells nodes apart, e.g. ``10.0.3.7-5fd2``: nodes may share a host."""
    name = str(node["NodeName"])
    return name if name != node["NodeManagerAddress"] else f"{name}-{node['NodeID'][:4]}"
