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
from collections.abc import Iterator
from typing import Any
from unittest import mock

from proof.judging import judge
from proof.seeds import Verdict, command
from proof.standins import Inline, Window
from proof.world import Weather, World, weather
from support.fake_cluster import FakeCluster, small_sweep
from support.unreliable_store import Interleaving, Seat

from orchestrator.control import sweep_snapshot
from orchestrator.control.controller import Controller
from orchestrator.control.lifecycle import CancelAsked, Policy, advance
from orchestrator.control.term import SteppedDown, Term
from orchestrator.grid.schema import Checkpoint, Recovery
from orchestrator.grid.sweep import Sweep
from storage import snapshots
from storage.errors import Fenced, StorageError, Unavailable
from storage.ledger import append_until_said
from storage.log import run_log
from storage.memory import MemoryStore

CALM_S = 400
"""So long the calm controller has, in ticks of a second: it needs a tenth of that."""
MOST_CONTROLLERS = 5
MOST_CALLS = 60_000


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
    found = found or judge(
        world.sweep,
        interleaving.inner,
        world.clusters,
        most_attempts=drawn.most_attempts,
        arrived_late=interleaving.arrived_late,
    )
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
            if world.odds(world.weather.drains):
                drain(world, controller, cluster)
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


def drain(world: World, controller: Controller, cluster: FakeCluster) -> None:
    """An operator drains a node, or lets it be used again."""
    node = world.chance.choice([slot.node for slot in cluster.observe()])
    grace_s = world.chance.choice((None, 0.0, 2.0))
    world.note(f"drain of {node}: {grace_s}")
    with contextlib.suppress(StorageError):
        controller.drain(node, grace_s)


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
        asked = CancelAsked(at=world.now)
        for _ in append_until_said(log, lambda state: advance(state, asked, Policy())):
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
            for node in {slot.node: None for slot in cluster.observe()}:
                with contextlib.suppress(Fenced):
                    controller.drain(node, None)
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


if __name__ == "__main__":
    sys.exit(command(play, "simulate", __doc__))
