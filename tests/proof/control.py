"""Random histories of a small sweep: real controllers, on a cluster and a store that do whatever can befall.

    python -m proof.control -n 100000 --seed 1      # the last line: {"schedules": 100000, "violations": 0}
    python -m proof.control -n 1 --seed 4711        # one history again, told call by call

Each seed is one history of the real ``Controller`` in virtual time: nodes are killed, frozen, cut off and
come back, reports and orders are lost, late or repeated, the store fails, controllers die at any of their
calls and are succeeded, or are two at once, people cancel. Then it is calm, and a controller that knows
nothing but the store and a cluster must bring every run to its end; what is in the store is judged then.
"""

import contextlib
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

from proof.judging import judge
from proof.seeds import Verdict, command
from support.fake_cluster import FakeCluster, small_sweep
from support.unreliable_store import Interleaving, Seat

from orchestrator import sweep_snapshot
from orchestrator.appending import append_decided
from orchestrator.cluster import Health, Order, Slot
from orchestrator.controller import Controller
from orchestrator.grid_schema import Checkpoint, Recovery
from orchestrator.lifecycle import CancelAsked, Policy, advance
from orchestrator.readers import PATIENCE_S, Readers
from orchestrator.sweep import Sweep
from orchestrator.term import SteppedDown, Term
from storage import snapshots
from storage.errors import Fenced, StorageError, Unavailable
from storage.log import run_log
from storage.memory import MemoryStore

HORIZON_S = 45
"""So long anything may go wrong."""
CALM_S = 400
"""So long the calm controller has, in ticks of a second: it needs a tenth of that."""
HEARD_S = 3.0
"""A slot of which no report came for longer is not known to live."""
MOST_CONTROLLERS = 5
MOST_CALLS = 60_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather:
    """How likely what goes wrong, in one history."""

    store: float = 0.0
    """Of a call."""
    cluster: float = 0.0
    """Of a second."""
    messages: float = 0.0
    """Of a report or an order."""
    deaths: float = 0.0
    """Of a controller, at each of its calls."""
    hangs: float = 0.0
    """Of what a reader does."""
    second: float = 0.0
    cancels: float = 0.0
    pace: float = 0.1
    """Of a second passing while a controller waits for one call."""

    @property
    def most_attempts(self) -> int | None:
        """What a run may need if nothing happens that should end an attempt.

        Controllers may die as they like; one that takes over on another cluster begins each run once more.
        """
        harmful = self.store or self.cluster or self.messages or self.hangs or self.cancels
        return None if harmful else 1 + (self.second > 0)


def weather(chance: random.Random) -> Weather:
    if chance.random() < 0.15:
        return Weather(
            deaths=chance.choice((0.0, 0.01, 0.05)), second=chance.choice((0.0, 0.0, 1.0)), pace=0.02
        )
    return Weather(
        store=chance.choice((0.0, 0.0, 0.03, 0.1, 0.25)),
        cluster=chance.choice((0.0, 0.05, 0.2, 0.4)),
        messages=chance.choice((0.0, 0.05, 0.3)),
        deaths=chance.choice((0.0, 0.005, 0.02)),
        hangs=chance.choice((0.0, 0.0, 0.1)),
        second=0.35,
        cancels=chance.choice((0.0, 0.3)),
        pace=chance.choice((0.02, 0.1, 0.3)),
    )


@dataclass(slots=True)
class World:
    """A sweep, its store, and who works on it."""

    interleaving: Interleaving
    chance: random.Random
    weather: Weather
    sweep: Sweep
    clusters: list[FakeCluster] = field(default_factory=list)
    controllers: int = 0
    idle: int = 0
    """So many controllers wait for the next second."""
    alive: int = 0

    @property
    def now(self) -> float:
        return self.clusters[0].now if self.clusters else 1000.0

    @property
    def over(self) -> bool:
        return self.now >= 1000.0 + HORIZON_S

    def clock(self) -> float:
        return self.now

    def odds(self, likely: float) -> bool:
        return likely > 0 and self.chance.random() < likely

    def advance(self) -> None:
        for cluster in self.clusters:
            cluster.advance()

    def note(self, line: str) -> None:
        self.interleaving.note(f"{self.now - 1000:4.0f} s  {line}")


def play(seed: int, *, record: bool = False) -> Verdict:
    """Live one seed's history and judge it."""
    chance = random.Random(seed)
    drawn = weather(chance)
    interleaving = Interleaving(
        chance,
        MemoryStore(),
        faults=drawn.store,
        deaths=drawn.deaths,
        record=record,
        most_calls=MOST_CALLS,
    )
    world = World(interleaving, chance, drawn, sweep_of(chance))
    world.note(f"{drawn}, {world.sweep.recovery}, {world.sweep.checkpoint}")
    with _often_saved(chance):
        interleaving.spawn("time", lambda seat: pass_time(world, seat), mortal=False)
        if world.odds(drawn.cancels):
            interleaving.spawn("person", lambda seat: cancel(world, seat))
        interleaving.run()
        found = list(interleaving.problems) or settle(world)
    found = found or judge(world.sweep, interleaving.inner, world.clusters, most_attempts=drawn.most_attempts)
    return Verdict(seed, found, interleaving.history)


def sweep_of(chance: random.Random) -> Sweep:
    return small_sweep(
        runs=chance.randint(1, 3),
        max_steps=chance.choice((2, 3, 5)),
        checkpoint=Checkpoint(keep_last=chance.choice((1, 1, 2)), grace_s=chance.choice((0.0, 0.0, 4.0))),
        recovery=Recovery(
            max_failures=chance.choice((1, 3)),
            backoff_s=1.0,
            max_backoff_s=4.0,
            silence_s=chance.choice((4.0, 8.0)),
            stop_grace_s=2.0,
        ),
    )


@contextlib.contextmanager
def _often_saved(chance: random.Random) -> Iterator[None]:
    """Snapshots are as rare as histories are long."""
    every_s, long = chance.choice(((5.0, 4), (300.0, 64)))
    with mock.patch.object(sweep_snapshot, "EVERY_S", every_s), mock.patch.object(snapshots, "LONG", long):
        yield


# What the actors do.


def pass_time(world: World, seat: Seat) -> None:
    """Lets seconds pass, in which trainers train and misfortunes happen. Its store is the trainers'."""
    cluster = FakeCluster(
        seat,
        world.sweep,
        nodes=world.chance.randint(1, 3),
        slots_per_node=world.chance.choice((1, 1, 2)),
        commit_every=world.chance.choice((1, 2)),
    )
    world.clusters.append(cluster)
    employ(world, cluster)
    rival_at = world.now + world.chance.randint(0, 20) if world.odds(world.weather.second) else None
    while not world.over and (world.alive or rival_at):
        if world.idle >= world.alive or world.odds(world.weather.pace):
            world.advance()
            for each in world.clusters:
                if world.odds(world.weather.cluster):
                    world.note(f"misfortune: {each.misfortune(world.chance)}")
            if rival_at and world.now >= rival_at:
                rival_at = None
                rival(world, seat)
        world.interleaving.pause()


def rival(world: World, seat: Seat) -> None:
    """A second controller: on the same cluster, or on one of its own."""
    if world.odds(0.5):
        world.clusters.append(FakeCluster(seat, world.sweep, nodes=2, name="m", now=world.now))
    employ(world, world.clusters[-1])


def employ(world: World, cluster: FakeCluster) -> None:
    """Start a controller."""
    world.controllers += 1
    if world.controllers <= MOST_CONTROLLERS:
        world.alive += 1
        name = f"controller {world.controllers}"
        world.interleaving.spawn(name, lambda seat: control(world, seat, cluster))


def control(world: World, seat: Seat, cluster: FakeCluster) -> None:
    """A controller's process, as ``controller_actor`` has it; one that dies is mostly succeeded."""
    replaced = False
    try:
        controller = office(world, seat, cluster)
        while controller and not controller.done and not world.over:
            controller.tick()
            if world.odds(world.weather.cancels / 50):
                with contextlib.suppress(StorageError):
                    controller.cancel([world.chance.choice(world.sweep.runs).run_id])
            next_second(world)
    except SteppedDown as error:
        world.note(f"{seat.name} steps down: {error}")
    except BaseException:
        replaced = world.odds(0.8)
        raise
    finally:
        world.alive -= 1
        if replaced:
            employ(world, cluster)


def office(world: World, seat: Seat, cluster: FakeCluster) -> Controller | None:
    for _ in range(5):
        try:
            term = Term(seat, world.sweep.name)
        except Unavailable:
            continue
        return controller_of(world, seat, Window(world, seat.name, cluster), term)
    return None


def controller_of(world: World, store: Any, cluster: Any, term: Term) -> Controller:
    return Controller(
        world.sweep,
        store,
        cluster,
        world.clock,
        term,
        sleep=world.interleaving.pause,
        readers=Inline(world),
    )


def next_second(world: World) -> None:
    """Wait until time has passed; rarely not, for news may come at any time."""
    if world.odds(0.1):
        return
    now = world.now
    world.idle += 1
    try:
        while world.now == now and not world.over:
            world.interleaving.pause()
    finally:
        world.idle -= 1


def cancel(world: World, seat: Seat) -> None:
    """A person without a controller: writes into a run's log."""
    for _ in range(world.chance.randint(0, 200)):
        world.interleaving.pause()
    log = run_log(seat, world.chance.choice(world.sweep.runs).run_id, sleep=world.interleaving.pause)
    with contextlib.suppress(Fenced, Unavailable):
        for _ in append_decided(log, advance(log.refresh(), CancelAsked(at=world.now), Policy())):
            pass


def settle(world: World) -> list[str]:
    """When all is calm, who knows nothing but the store can end the sweep, and leaves nobody training."""
    world.interleaving.faults = 0.0
    world.weather = Weather()
    store = world.interleaving.inner
    for cluster in world.clusters:
        cluster.calm()
    cluster = world.chance.choice(world.clusters)
    for _ in range(2):  # what ghosts upload after the end, the next controller deletes
        try:
            controller = controller_of(world, store, cluster, Term(store, world.sweep.name))
            for _ in range(CALM_S):
                controller.tick()
                if controller.done:
                    break
                world.advance()
        except (StorageError, SteppedDown) as error:
            return [f"the last controller cannot go on: {type(error).__name__}: {error}"]
        if controller.damaged or not controller.done:
            return [f"the sweep does not end: {controller.damaged or controller.states}"]
        for _ in range(CALM_S):
            if not any(each.training_somewhere() for each in world.clusters):
                break
            world.advance()
    return [
        f"still trained after the end: {order}"
        for each in world.clusters
        for order in each.training_somewhere()
    ]


# What stands between a controller and the world.


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


if __name__ == "__main__":
    sys.exit(command(play, "simulate", __doc__))
