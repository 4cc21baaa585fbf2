"""The cluster as Ray sees it: nodes become slots, each slot an agent actor.

Agents are detached and named, so a controller that starts again finds them and adopts what they hold. A
report that fails with ``ActorUnavailableError`` makes a slot UNKNOWN; only ``ActorDiedError`` makes it GONE.
"""

import contextlib
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnschedulableError, OutOfMemoryError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from trainer.patience import one_line

from ..control.cluster import Health, Listening, Order, Slot, Work
from ..grid.schema import Resources
from .agent import NAMESPACE, Agent, AgentSetup, Report, attempt_name
from .ray_drain import drain, draining

REPORT_WAIT_S = 2.0
"""An agent with nothing new answers after this long; silence is measured in multiples of it."""

NODES_EVERY_S = 1.0

LONGEST_PAUSE_S = 60.0
"""Between agents on a node where none of them comes up; doubled from 2 s."""

VERDICT_S = 5.0
"""An agent often dies a moment before its node is known to be dead: only after so long it died alone."""

REMEMBER_S = 600.0
"""For so long a dead agent is told of, and then no more unless a run still counts on it."""

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
    gone_at: float = 0.0
    settled: bool = False
    """GONE, and it is known whether it died with its node or alone."""
    node_lost: bool = False
    out_of_memory: bool = False
    preempted: bool = False
    adopted: bool = False

    @property
    def may_train(self) -> bool:
        """A new agent does not before it was heard of: it may never get its place. An adopted one may."""
        return self.report is not None or self.adopted


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
            if any(pending[ref].health is Health.GONE for ref in ready):
                self._read_nodes()
        else:
            time.sleep(0.2)
        self.slots = tuple(self._slot(m) for m in self._members.values() if m.may_train)
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
                        node=name.removeprefix(self._prefix).rpartition("/")[0],
                        heard_at=self._listening.seconds,
                        adopted=True,
                    )

    def _refresh_nodes(self) -> None:
        if self._clock() - self._nodes_read_at < NODES_EVERY_S:
            return
        self._nodes_read_at = self._clock()
        self._read_nodes()
        unused = self.unused()
        self._forget(unused)
        living = [m for m in self._members.values() if m.health is not Health.GONE]
        if any(self._unplaced(m) for m in living):
            return  # adopted agents first say where they are, or two would share a slot
        here = Counter(m.node_id for m in living)
        limit = self._resources.max_concurrent
        room = None if limit is None else limit - sum(m.name not in unused for m in living)
        nodes = [n for n in self._nodes if n["Alive"] and self._may_open_on(n["NodeID"])]
        opened = openings(nodes, here, self._resources, room)
        left_alone = draining() if opened else ()  # Ray would not let them come up there
        if left_alone:
            nodes = [node for node in nodes if node["NodeID"] not in left_alone]
            opened = openings(nodes, here, self._resources, room)
        for node in opened:
            self._create(node)

    def _read_nodes(self) -> None:
        """Ask Ray which nodes there are, and judge by it which agents died with theirs."""
        self._nodes = ray.nodes()
        dead = [m for m in self._members.values() if m.health is Health.GONE and not m.settled]
        if not dead:
            return
        alive = {known for n in self._nodes if n["Alive"] for known in (n["NodeID"], node_name(n))}
        for member in dead:
            member.node_lost = (member.node_id or member.node) not in alive
            explained = member.node_lost or member.out_of_memory or member.preempted
            member.settled = explained or self._clock() - member.gone_at >= VERDICT_S
            if member.settled:
                logger.warning("%s died %s", member.name, "with its node" if member.node_lost else "alone")

    def _forget(self, unused: Collection[str]) -> None:
        """Drop the agents that are long dead: nodes may come and go for weeks."""
        until = self._clock() - REMEMBER_S
        for member in [m for m in self._members.values() if m.settled]:
            if not member.may_train or (member.gone_at < until and member.name in unused):
                del self._members[member.name]

    def _may_open_on(self, node_id: str) -> bool:
        return self._no_agent_before.get(node_id, 0.0) <= self._clock()

    def _unplaced(self, member: _Member) -> bool:
        """An adopted agent that may still say where it is; one that stays silent holds up nobody."""
        silent_s = self._listening.seconds - member.heard_at
        return member.node_id is None and member.health is not Health.GONE and silent_s < 3 * REPORT_WAIT_S

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
            member.gone_at = self._clock()
            # At first sight: asked again, Ray may have forgotten it.
            member.preempted = bool(getattr(error, "preempted", False))
            if member.report is None:
                self._misfires[member.node_id] = self._misfires.get(member.node_id, 0) + 1
                pause_s = min(2.0 ** self._misfires[member.node_id], LONGEST_PAUSE_S)
                self._no_agent_before[member.node_id] = self._clock() + pause_s
            logger.warning("%s is gone: %s", member.name, _reason(error))
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

    def _heed(self, report: Report) -> None:
        """Let Ray know, once, that a node is about to be taken away."""
        notice = report.notice
        if notice and notice.soon and report.node_id not in self._drained:
            self._drained.add(report.node_id)
            drain(report.node_id, str(notice), notice.left_s)

    def _slot(self, member: _Member) -> Slot:
        silent_s = self._listening.seconds - member.heard_at
        unheard = member.report is None or silent_s > 3 * REPORT_WAIT_S
        work: Work | None = member.report.work if member.report else None
        waits = member.health is Health.GONE and not member.settled
        notice = member.report.notice if member.report else None
        if notice and notice.left_s is not None:
            notice = replace(notice, left_s=notice.left_s - silent_s)
        return Slot(
            slot=member.name,
            node=member.node,
            up_since=member.up_since,
            health=Health.UNKNOWN if waits or (unheard and member.health is Health.ALIVE) else member.health,
            silent_s=silent_s,
            node_lost=member.node_lost,
            out_of_memory=member.out_of_memory,
            preempted=member.preempted,
            notice=notice,
            unheard=member.report.unheard if member.report else "",
            unfit=member.report.unfit if member.report else "",
            speed=member.report.speed if member.report else None,
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


def openings(
    nodes: Sequence[dict[str, Any]], here: Mapping[str | None, int], want: Resources, room: int | None
) -> list[dict[str, Any]]:
    """Return the nodes on which to start an agent, each as often as it has room for one more.

    Args:
        here: How many agents a node has, by its id.
        room: So many agents may be started in all; None: as many as fit.
    """
    opened: list[dict[str, Any]] = []
    for node in nodes:
        if room is not None and len(opened) >= room:
            break
        missing = slots_on(node["Resources"], want) - here.get(node["NodeID"], 0)
        opened += [node] * max(0, missing)
    return opened if room is None else opened[: max(0, room)]


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


def _reason(error: RayError) -> str:
    """Return the line that says why: the last one, below a traceback or what Ray says of the actor."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith("The actor never ran")]
    return one_line(said[-1]) if said else type(error).__name__


def node_name(node: dict[str, Any]) -> str:
    """Return a short name that tells nodes apart, e.g. ``10.0.3.7-5fd2``: nodes may share a host."""
    name = str(node["NodeName"])
    return name if name != node["NodeManagerAddress"] else f"{name}-{node['NodeID'][:4]}"
