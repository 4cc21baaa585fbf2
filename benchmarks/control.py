"""What a tick of the controller costs with very many runs, and how that grows.

    python benchmarks/control.py [--sizes 1000 11000 100000] [--slots 1000] [--ticks 400] [--save]

The real controller, on slots and a store in memory: what is measured is its own work, not a network's. A tick
stands for a second. In each, trainers commit (each every two minutes), one or so completes and its slot takes
the next run, and every 20 s a node of eight slots is lost and another comes. ``requests`` is what a store
would be asked. Then a new controller starts over the same logs: from the sweep's snapshot, and without any.

Each size is measured in a process of its own. ``rss_mb`` is all of it, the logs in memory too; ``heap_mb`` is
by how much it grew from before the controller was made. A machine that does other work too makes ticks longer
than what they use of the processor, which is told beside them.
"""

import argparse
import bisect
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from harness import BenchmarkFailed, conclude, run, show, verdict

from orchestrator.control.cluster import Health, Order, Slot, Work
from orchestrator.control.controller import Controller
from orchestrator.control.term import Term
from orchestrator.grid.schema import Checkpoint, Storage
from orchestrator.grid.sweep import PlannedRun, Sweep
from storage import layout
from storage.log import RunLog, run_log
from storage.memory import MemoryStore
from storage.object_store import ObjectInfo
from storage.records import Committed, Started, StoredFile
from trainer.config import Base, Dataset, RunSpec

SLOTS_PER_NODE = 8
COMMIT_EVERY_S = 120
LIFE_S = 200
"""Of the shortest run; the longest lives three times as long."""
NODE_LOST_EVERY_S = 20
GOAL_TICK_S, GOAL_CORES, GOAL_RSS_MB = 0.1, 1.0, 1024.0


class Shelf(MemoryStore):
    """Keys in order, so that a listing costs what it lists, and a count of what is asked."""

    def __init__(self) -> None:
        super().__init__("bench")
        self._keys: list[str] = []
        self.requests = 0

    def put(self, key: str, body: bytes | Path) -> None:
        self.requests += 1
        if key not in self._objects:
            bisect.insort(self._keys, key)
        super().put(key, body)

    def create(self, key: str, body: bytes) -> bool:
        self.requests += 1
        if not super().create(key, body):
            return False
        bisect.insort(self._keys, key)
        return True

    def get(self, key: str) -> bytes:
        self.requests += 1
        return super().get(key)

    def head(self, key: str) -> ObjectInfo | None:
        self.requests += 1
        return super().head(key)

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        self.requests += 1
        found = []
        for at in range(bisect.bisect_left(self._keys, max(prefix, after)), len(self._keys)):
            key = self._keys[at]
            if not key.startswith(prefix):
                break
            if key > after:
                found.append(ObjectInfo(key, len(self._objects[key])))
        return iter(found)

    def delete(self, keys: Iterable[str]) -> None:
        doomed = [key for key in keys if key in self._objects]
        self.requests += bool(doomed)
        super().delete(doomed)
        for key in doomed:
            del self._keys[bisect.bisect_left(self._keys, key)]


@dataclass(slots=True)
class Place:
    """A slot, and what trains there."""

    slot: str
    node: str
    up_since: float
    order: Order | None = None
    log: RunLog | None = None
    step: int = 0
    exit_code: int | None = None
    gone: bool = False


@dataclass(slots=True)
class Slots:
    """Implements ``Cluster``; a trainer makes a step a second and commits as real ones do."""

    store: Shelf
    count: int
    now: float = 1000.0
    places: dict[str, Place] = field(default_factory=dict)
    nodes: int = 0
    completed: int = 0

    def __post_init__(self) -> None:
        while len(self.places) < self.count:
            self.add_node()

    def clock(self) -> float:
        return self.now

    def add_node(self) -> None:
        self.nodes += 1
        for number in range(SLOTS_PER_NODE):
            node = f"n{self.nodes}"
            slot = f"{node}/{number}"
            self.places[slot] = Place(slot, node, self.now)

    def observe(self) -> tuple[Slot, ...]:
        return tuple(_slot(place) for place in self.places.values())

    def start(self, slot: str, order: Order) -> None:
        place = self.places[slot]
        if place.order != order and not place.gone:
            place.order, place.exit_code = order, None
            place.log = run_log(self.store, order.run_id, readers=1, remember=False)
            place.step = place.log.refresh().committed_step

    def stop(self, slot: str, run_id: str, attempt: int, grace_s: float) -> None:
        pass

    def close(self) -> None:
        pass

    def advance(self) -> None:
        self.now += 1.0
        if int(self.now) % NODE_LOST_EVERY_S == 0:
            self.lose_node()
            self.add_node()
        for n, place in enumerate(self.places.values()):
            if place.order and place.exit_code is None and not place.gone:
                self._train(n, place)

    def lose_node(self) -> None:
        node = next(place.node for place in self.places.values() if not place.gone)
        for place in self.places.values():
            place.gone = place.gone or place.node == node

    def _train(self, n: int, place: Place) -> None:
        assert place.order
        assert place.log
        place.step += 1
        final = place.step >= LIFE_S + n % (2 * LIFE_S)
        if place.log.state.running and place.log.state.running.started is None:
            place.log.append(Started(attempt=place.order.attempt, step=place.step, at=self.now))
        if final or (place.step + n) % COMMIT_EVERY_S == 0:
            place.log.append(_committed(place.order, place.step, final=final, at=self.now))
        if final:
            place.exit_code = 0
            self.completed += 1


def _slot(place: Place) -> Slot:
    """What the controller of a Ray cluster makes of a report, anew for each tick."""
    work, order = None, place.order
    if order:
        work = Work(
            run_id=order.run_id,
            attempt=order.attempt,
            step=place.step,
            first_step_at=place.up_since,
            step_s=1.0,
            loss=0.1,
            exit_code=place.exit_code,
        )
    return Slot(
        slot=place.slot,
        node=place.node,
        up_since=place.up_since,
        health=Health.GONE if place.gone else Health.ALIVE,
        node_lost=place.gone,
        work=work,
    )


def _committed(order: Order, step: int, *, final: bool, at: float) -> Committed:
    names = ("adapter.safetensors", "state/optimizer.safetensors", "state/loop.json")
    return Committed(
        attempt=order.attempt,
        incarnation=order.incarnation,
        step=step,
        files=tuple(StoredFile(name=name, size_bytes=1 << 20, sha256=f"{step:064x}") for name in names),
        metrics={"train/loss": 0.1},
        final=final,
        at=at,
    )


def sweep_of(runs: int) -> Sweep:
    dataset = Dataset(path="/data")
    return Sweep(
        name="bench",
        storage=Storage(url="memory://bench"),
        checkpoint=Checkpoint(keep_last=2, grace_s=0.0),
        runs=tuple(
            PlannedRun(
                run_id=f"bench-{n:06d}",
                index=n,
                parameters={"seed": n},
                spec=RunSpec(base=Base(model="owner/model", max_train_steps=LIFE_S, seed=n), dataset=dataset),
            )
            for n in range(runs)
        ),
    )


def measure(runs: int, slots: int, ticks: int) -> dict[str, Any]:
    """One size, in this process."""
    process = psutil.Process()
    sweep, store = sweep_of(runs), Shelf()
    cluster = Slots(store, slots)
    gc.collect()
    before_mb = process.memory_info().rss / 2**20
    controller = Controller(sweep, store, cluster, cluster.clock, Term(store, sweep.name))
    launched_s = _timed(controller)
    gc.collect()
    gc.freeze()  # as the controller's actor does
    running = sum(state.running is not None for state in controller.states.values())
    if running != min(runs, slots):
        raise BenchmarkFailed(f"{running} runs are running on {slots} slots")
    taken, used, requests = list[float](), list[float](), 0
    for _ in range(ticks):
        cluster.advance()
        asked, cpu, began = store.requests, time.process_time(), time.perf_counter()
        controller.tick()
        taken.append(time.perf_counter() - began)
        used.append(time.process_time() - cpu)
        requests += store.requests - asked
    gc.collect()
    rss_mb = process.memory_info().rss / 2**20
    return {
        "runs": runs,
        "first_tick_s": round(launched_s, 3),
        "tick_p50_ms": _ms(statistics.median(taken)),
        "tick_p99_ms": _ms(statistics.quantiles(taken, n=100)[98]),
        "tick_max_ms": _ms(max(taken)),
        "tick_cpu_p50_ms": _ms(statistics.median(used)),
        "tick_cpu_p99_ms": _ms(statistics.quantiles(used, n=100)[98]),
        "cores": round(statistics.fmean(used), 3),
        "requests_per_tick": round(requests / ticks, 1),
        "rss_mb": round(rss_mb),
        "heap_mb": round(rss_mb - before_mb),
        "completed": cluster.completed,
        "restart": _restarts(sweep, store, cluster, controller),
    }


def _restarts(sweep: Sweep, store: Shelf, cluster: Slots, old: Controller) -> dict[str, Any]:
    """A new controller's first tick: from the snapshot that the old one left, and without any."""
    figures = {}
    for name in ("snapshot", "logs"):
        if name == "logs":
            store.delete([layout.sweep_snapshot(sweep.name)])
        elif store.head(layout.sweep_snapshot(sweep.name)) is None:
            continue  # so short a measurement
        controller = Controller(sweep, store, cluster, cluster.clock, Term(store, sweep.name))
        asked, took = store.requests, _timed(controller)
        figures[name] = {"s": round(took, 3), "requests": store.requests - asked}
        if {k: s.attempt for k, s in controller.states.items()} != {
            k: s.attempt for k, s in old.states.items()
        } and name == "snapshot":
            raise BenchmarkFailed("the new controller knows something else than the old one")
    return figures


def _timed(controller: Controller) -> float:
    began = time.perf_counter()
    controller.tick()
    return time.perf_counter() - began


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)


def in_a_process(runs: int, slots: int, ticks: int) -> dict[str, Any]:
    print(f"{runs} runs on {slots} slots, {ticks} ticks", file=sys.stderr)
    command = [sys.executable, __file__, "--one", str(runs), "--slots", str(slots), "--ticks", str(ticks)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise BenchmarkFailed(f"{runs} runs: exit code {done.returncode}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 11_000, 100_000], help="runs")
    parser.add_argument("--slots", type=int, default=1000)
    parser.add_argument("--ticks", type=int, default=400)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.slots, options.ticks)))
        return
    sizes = [in_a_process(size, options.slots, options.ticks) for size in options.sizes]
    show(
        f"The controller on {options.slots} slots, one tick a second",
        ("runs", "p50 ms", "p99 ms", "of it CPU", "cores", "MB", "requests", "restart s", "from logs s"),
        [_row(figures) for figures in sizes],
    )
    judge(sizes)
    conclude("control", {"slots": options.slots, "ticks": options.ticks, "sizes": sizes}, save=options.save)


def judge(sizes: Sequence[dict[str, Any]]) -> None:
    """Say how the size that the goals are about stands to them."""
    for figures in sizes:
        if 10_000 < figures["runs"] < 20_000:
            print(f"p99 of its goal: {verdict(figures['tick_p99_ms'] / 1000 / GOAL_TICK_S, 1.0)}")
            print(f"cores of its goal: {verdict(figures['cores'] / GOAL_CORES, 1.0)}")
            print(f"memory of its goal: {verdict(figures['rss_mb'] / GOAL_RSS_MB, 1.0)}")


def _row(figures: dict[str, Any]) -> tuple[str, ...]:
    restart = figures["restart"]
    return (
        f"{figures['runs']:,}",
        f"{figures['tick_p50_ms']:.1f}",
        f"{figures['tick_p99_ms']:.1f}",
        f"{figures['tick_cpu_p99_ms']:.1f}",
        f"{figures['cores']:.2f}",
        str(figures["rss_mb"]),
        f"{figures['requests_per_tick']:.1f}",
        f"{restart['snapshot']['s']:.2f}" if "snapshot" in restart else "-",
        f"{restart['logs']['s']:.2f}",
    )


if __name__ == "__main__":
    run(main)
