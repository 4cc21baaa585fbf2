"""A cluster in virtual time, whose trainers commit to the real logs of a store as real ones do.

    cluster = FakeCluster(store, sweep, nodes=2)
    controller = Controller(sweep, store, cluster, clock=cluster.clock)
    while not controller.done:
        controller.tick()
        cluster.advance(1.0)

``support.fake_trainer`` says what training is here.
"""

import random
from collections.abc import Iterator
from dataclasses import replace

from support.fake_trainer import FILE, KILLED, Agent, Trainer, weights_at

from orchestrator.control.cluster import Health, Order, Slot
from orchestrator.control.controller import Controller
from orchestrator.grid.schema import Checkpoint, Metric, Recovery, Storage
from orchestrator.grid.sweep import PlannedRun, Sweep
from orchestrator.notices.notice import Kind, Notice, Standing, after, told
from storage.log import run_log
from storage.object_store import ObjectStore
from trainer.config import Base, Dataset, RunSpec

__all__ = ["FILE", "FakeCluster", "run_to_end", "small_sweep", "weights_at"]

_MISFORTUNES = (
    "node",
    "ghost",
    "leave",
    "come",
    "agent",
    "silence",
    "freeze",
    "hear",
    "hear",
    "order",
    "kill",
    "error",
    "preempt",
    "warn",
    "withdraw",
)


def small_sweep(
    runs: int = 2,
    max_steps: int = 6,
    *,
    name: str = "cat",
    checkpoint: Checkpoint | None = None,
    recovery: Recovery | None = None,
    metric: Metric | None = None,
) -> Sweep:
    """A sweep of runs that only ``FakeCluster`` can train."""
    planned = []
    for index in range(runs):
        parameters = {"seed": index}
        spec = RunSpec(
            base=Base(model="owner/model", max_train_steps=max_steps, seed=index),
            dataset=Dataset(path="/data"),
        )
        run_id = f"{name}-{index}-{index:08x}"
        planned.append(PlannedRun(run_id=run_id, index=index, parameters=parameters, spec=spec))
    return Sweep(
        name=name,
        storage=Storage(url="memory://sweep"),
        checkpoint=checkpoint or Checkpoint(grace_s=0.0),
        recovery=recovery or Recovery(backoff_s=2.0, silence_s=10.0),
        metric=metric,
        runs=tuple(planned),
    )


class FakeCluster:
    """Implements ``orchestrator.control.cluster.Cluster``; its other methods are what happens to it.

    Args:
        store: Where trainers commit; never the controller's faulty one.
        commit_every: Steps between a trainer's checkpoints.
    """

    def __init__(
        self,
        store: ObjectStore,
        sweep: Sweep,
        *,
        nodes: int = 2,
        slots_per_node: int = 1,
        commit_every: int = 2,
        name: str = "n",
        now: float = 1000.0,
    ) -> None:
        self._store = store
        self._max_steps = {run.run_id: run.spec.base.max_train_steps for run in sweep.runs}
        self._slots_per_node = slots_per_node
        self._commit_every = commit_every
        self._agents: dict[str, Agent] = {}
        self.trainers: list[Trainer] = []
        """All that ever began, in order."""
        self.ghosts: list[Trainer] = []
        """Trainers that the cluster believes dead."""
        self._name = name
        self._nodes_added = 0
        self.now = self.began = now
        self.unfit: dict[str, str] = {}
        """Why slots can train nothing."""
        self.lose_orders = 0
        """So many of the next orders do not arrive."""
        self.begun: list[Order] = []
        """Every attempt that began to train, in order."""
        self.lost_agents: set[str] = set()
        """Slots whose agent died alone."""
        self.blamed: set[tuple[str, int]] = set()
        """Attempts, by run and number, that ended such that the run itself may be to blame."""
        self.closed = False
        for _ in range(nodes):
            self.add_node()

    # What the controller sees and does.

    def observe(self) -> tuple[Slot, ...]:
        return tuple(self._slot(agent) for agent in self._agents.values())

    def start(self, slot: str, order: Order) -> None:
        agent = self._agents[slot]
        if self.lose_orders:
            self.lose_orders -= 1
        elif not agent.gone and order not in agent.orders and not agent.holds(order):
            agent.orders.append(order)

    def stop(self, slot: str, run_id: str, attempt: int, grace_s: float) -> None:
        agent = self._agents[slot]
        trainer = agent.trainer
        held = (trainer.order.run_id, trainer.order.attempt) if trainer else None
        if trainer is None or held != (run_id, attempt) or agent.silent_since is not None:
            return
        trainer.stopping = True
        trainer.asked = trainer.asked or trainer.exit_code is None
        if grace_s <= 0 and trainer.exit_code is None:
            trainer.exit_code = KILLED

    def close(self) -> None:
        self.closed = True

    def clock(self) -> float:
        return self.now

    # What happens to it.

    def advance(self, seconds: int = 1) -> None:
        """Let time pass: orders arrive, trainers make a step a second, also those that nobody sees."""
        for _ in range(seconds):
            self.now += 1.0
            for agent in self._agents.values():
                if agent.standing.withdrawn_at is not None:
                    agent.standing = after(agent.standing, None, self.now)
                self._take_order(agent)
                agent.heed(self.now)
                if agent.trainer and not agent.frozen:
                    agent.trainer.train(self.now)
            for ghost in self.ghosts:
                ghost.train(self.now)

    def add_node(self) -> str:
        self._nodes_added += 1
        node = f"{self._name}{self._nodes_added}"
        for number in range(self._slots_per_node):
            slot = f"{node}/{number}"
            self._agents[slot] = Agent(slot, node, up_since=self.now)
        return node

    def lose_node(self, node: str, *, ghosts: bool = False) -> None:
        """A node is gone. With ``ghosts`` the cluster only believes so: what it trains, trains on."""
        for agent in self._living():
            if agent.node == node:
                self._lose(agent, node_lost=True, ghost=ghosts)

    def lose_agent(self, slot: str) -> None:
        self.lost_agents.add(slot)
        self._lose(self._agents[slot], node_lost=False, ghost=False)

    def warn(self, node: str, left_s: float | None = 30.0, kind: Kind = Kind.TERMINATE) -> None:
        """A node is told that it is about to be taken away."""
        for agent in self._living():
            if agent.node == node:
                notice = Notice(kind=kind, source="AWS", left_s=left_s)
                agent.standing = after(agent.standing, notice, self.now)
                agent.heed(self.now)

    def withdraw(self, node: str) -> None:
        """A node is not told so any more; asked again each second, it is used again when it has been calm."""
        for agent in self._living():
            if agent.node == node:
                agent.standing = after(agent.standing, None, self.now)

    def lift_notices(self) -> None:
        """Every node that lives is known to live on."""
        for agent in self._living():
            agent.standing = Standing()

    def silence(self, slot: str) -> None:
        """A slot cannot be reached from now on; its trainer knows nothing of it."""
        if self._agents[slot].silent_since is None:
            self._agents[slot].silent_since = self.now

    def freeze(self, slot: str) -> None:
        """A slot cannot be reached, and what it trains stands still."""
        self.silence(slot)
        self._agents[slot].frozen = True

    def hear(self, slot: str) -> None:
        """A silent slot can be reached again, and goes on if it stood still."""
        self._agents[slot].silent_since = None
        self._agents[slot].frozen = False

    def hear_all(self) -> None:
        for agent in self._living():
            self.hear(agent.slot)

    def exit(self, slot: str, code: int, error: str = "") -> None:
        """The training process of a slot ends, as it is."""
        trainer = self._agents[slot].trainer
        assert trainer is not None
        self._blame(trainer)
        trainer.exit_code, trainer.error = code, error

    def busy(self) -> list[str]:
        """The slots that train, seen or unseen, oldest first."""
        return [a.slot for a in self._living() if a.trainer and a.trainer.exit_code is None]

    def training(self, run_id: str) -> str:
        """The slot that trains a run."""
        (slot,) = [s for s in self.busy() if (t := self._agents[s].trainer) and t.order.run_id == run_id]
        return slot

    def calm(self) -> None:
        """From now on all that lives can be heard, orders arrive, and something lives."""
        self.lose_orders = 0
        self.hear_all()
        self.lift_notices()
        if not self._living():
            self.add_node()

    def training_somewhere(self) -> list[Order]:
        """What is trained, seen or unseen, also by those whom the cluster believes dead."""
        seen = (agent.trainer for agent in self._living() if agent.trainer)
        return [trainer.order for trainer in (*seen, *self.ghosts) if trainer.exit_code is None]

    def misfortune(self, rng: random.Random) -> str:
        """Do one thing, drawn at random, that a cluster does to those who rely on it, and say which."""
        living = self._living()
        if not living:
            return f"{self.add_node()} comes"
        agent = rng.choice(living)
        kind = rng.choice(_MISFORTUNES)
        match kind:
            case "node" | "ghost":
                self.lose_node(agent.node, ghosts=kind == "ghost")
                self.add_node()
            case "leave":
                self.lose_node(agent.node)
            case "come":
                self.add_node()
            case "agent":
                self.lose_agent(agent.slot)
                self.add_node()
            case "silence":
                self.silence(agent.slot)
            case "freeze":
                self.freeze(agent.slot)
            case "hear":
                self.hear_all()
            case "order":
                self.lose_orders += 1
            case "kill" if agent.slot in self.busy():
                self.exit(agent.slot, KILLED)
            case "error" if agent.slot in self.busy():
                self.exit(agent.slot, 1, f"RuntimeError: number {len(self.blamed)}")
            case "preempt" if agent.slot in self.busy() and agent.trainer:
                agent.trainer.stopping = True
            case "warn":
                self.warn(agent.node, rng.choice((5.0, 30.0, None)))
            case "withdraw":
                self.withdraw(agent.node)
            case _:
                return f"no {kind}: nothing trains at {agent.slot}"
        return f"{kind} at {agent.slot}"

    def _blame(self, trainer: Trainer | None) -> None:
        if trainer:
            self.blamed.add((trainer.order.run_id, trainer.order.attempt))

    def _living(self) -> list[Agent]:
        return [agent for agent in self._agents.values() if not agent.gone]

    def _lose(self, agent: Agent, *, node_lost: bool, ghost: bool) -> None:
        self._slot(agent)
        agent.gone, agent.node_lost, agent.orders = True, node_lost, []
        if ghost and agent.trainer:
            self.ghosts.append(agent.trainer)
        agent.trainer = None

    def _take_order(self, agent: Agent) -> None:
        busy = agent.trainer is not None and agent.trainer.exit_code is None
        if agent.gone or agent.silent_since is not None or busy or not agent.orders:
            return
        order = agent.orders.pop(0)
        self.begun.append(order)
        log = run_log(self._store, order.run_id, sleep=_no_sleep, readers=1, remember=False)
        agent.trainer = Trainer(self._store, log, order, self._max_steps[order.run_id], self._commit_every)
        self.trainers.append(agent.trainer)
        agent.trainer.begin()

    def _slot(self, agent: Agent) -> Slot:
        heard = agent.silent_since is None and not agent.gone
        if heard:
            agent.reported = agent.trainer.work() if agent.trainer else None
        health = Health.GONE if agent.gone else Health.ALIVE if heard else Health.UNKNOWN
        return Slot(
            slot=agent.slot,
            node=agent.node,
            up_since=agent.up_since,
            health=health,
            silent_s=0.0 if agent.silent_since is None else self.now - agent.silent_since,
            node_lost=agent.node_lost,
            notice=told(agent.standing, self.now),
            unfit=self.unfit.get(agent.slot, ""),
            work=replace(agent.reported) if agent.reported else None,
        )


def run_to_end(
    controller: Controller, cluster: FakeCluster, *, misfortunes: random.Random | None = None
) -> Iterator[int]:
    """Yield after each tick, with its number, until the controller is done.

    Args:
        misfortunes: Draws what goes wrong, in the first 60 ticks, on average every fourth.
    """
    for tick in range(1000):
        controller.tick()
        yield tick
        if controller.done:
            return
        if misfortunes and tick < 60 and misfortunes.random() < 0.25:
            cluster.misfortune(misfortunes)
        if misfortunes and tick == 60:
            cluster.hear_all()
            cluster.lift_notices()
        cluster.advance()
    raise AssertionError(f"not done after 1000 ticks: {controller.states}")


def _no_sleep(seconds: float) -> None:
    """Tests wait for nobody."""
