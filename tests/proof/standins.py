"""Between a simulated controller and its world: a window on the cluster, and readers without threads."""

from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from dataclasses import replace
from typing import Any

from proof.world import World
from support.fake_cluster import FakeCluster

from orchestrator.control.cluster import Health, Order, Slot
from orchestrator.control.readers import PATIENCE_S, Readers

HEARD_S = 3.0
"""A slot of which no report came for longer is not known to live."""


class Window:
    """The cluster as one controller sees it: late, in parts, and sometimes not at all."""

    def __init__(self, world: World, name: str, cluster: FakeCluster) -> None:
        self._world = world
        self._name = name
        self._cluster = cluster
        self._began = world.now
        self._heard: dict[str, tuple[float, Slot]] = {}
        self._dead_before: set[str] | None = None

    def observe(self) -> tuple[Slot, ...]:
        self._world.interleaving.pause()
        there = self._cluster.observe()
        if self._dead_before is None:  # of an agent that is dead already no successor ever hears
            self._dead_before = {slot.slot for slot in there if slot.health is Health.GONE}
            return tuple(self._unheard(slot) for slot in there if slot.health is not Health.GONE)
        return tuple(self._seen(slot) for slot in there if slot.slot not in self._dead_before)

    def _unheard(self, slot: Slot) -> Slot:
        """An agent that was there before this controller, and has not said a word to it yet."""
        return replace(slot, health=Health.UNKNOWN, work=None, silent_s=0.0)

    def _seen(self, slot: Slot) -> Slot:
        now = self._world.now
        if slot.health is Health.GONE:
            return slot
        if slot.health is Health.ALIVE and not self._world.odds(self._world.weather.messages):
            self._heard[slot.slot] = (now, slot)
            return slot
        since, last = self._heard.get(slot.slot, (self._began, replace(slot, work=None)))
        silent_s = now - since
        unheard = slot.slot not in self._heard or silent_s > HEARD_S
        return replace(last, health=Health.UNKNOWN if unheard else Health.ALIVE, silent_s=silent_s)

    def start(self, slot: str, order: Order) -> None:
        self._send(
            f"start {order.run_id} attempt {order.attempt} at {slot}",
            lambda: self._cluster.start(slot, order),
        )

    def stop(self, slot: str, run_id: str, attempt: int, grace_s: float) -> None:
        self._send(
            f"stop {run_id} attempt {attempt} at {slot}",
            lambda: self._cluster.stop(slot, run_id, attempt, grace_s),
        )

    def close(self) -> None:
        pass

    def _send(self, what: str, effect: Callable[[], None]) -> None:
        """An order: it arrives once, or never, or late, or twice."""
        world = self._world
        world.interleaving.pause()
        fault = (
            world.chance.choice(("lost", "late", "twice")) if world.odds(world.weather.messages) else "sent"
        )
        world.note(f"{self._name}: {what} -> {fault}")
        if fault in ("sent", "twice"):
            effect()
        if fault in ("late", "twice"):
            world.interleaving.later(what, effect)


class Inline(Readers):
    """Readers without threads: what they do is done at once, or hangs for some calls."""

    threads = 1

    def __init__(self, world: World) -> None:
        self._world = world
        self._hanging: list[tuple[Future[Any], Callable[[], Any]]] = []
        super().__init__()

    def pool(self) -> Executor:
        return _AtOnce(self)

    def do(self, works: Mapping[str, Callable[[], None]], patience_s: float | None = PATIENCE_S) -> set[str]:
        begun = [name for name in works if not self.busy(name)]
        for name in begun:
            self.begin(name, works[name])
        self.go_on(all_of_it=patience_s is None)
        done = {name for name in begun if self._busy[name].done()}
        self.collect()
        return done

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        if self._world.odds(self._world.weather.hangs):
            self._hanging.append((future, work))
        else:
            _fulfil(future, work)
        return future

    def go_on(self, *, all_of_it: bool) -> None:
        hanging, self._hanging = self._hanging, []
        for future, work in hanging:
            if all_of_it or self._world.odds(0.4):
                _fulfil(future, work)
            else:
                self._hanging.append((future, work))


class _AtOnce(Executor):
    """Does everything when it is told."""

    def __init__(self, readers: Inline) -> None:
        self._readers = readers

    def submit(self, work: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        if arguments:  # who waits for it is not the controller's own thread: ``map``
            future: Future[Any] = Future()
            _fulfil(future, lambda: work(*arguments, **named))
            return future
        return self._readers.submit(work)


def _fulfil(future: Future[Any], work: Callable[[], Any]) -> None:
    try:
        future.set_result(work())
    except Exception as error:  # death is none: who dies keeps no promises
        future.set_exception(error)
