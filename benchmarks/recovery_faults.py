"""What faults cost on a cluster of several machines, ours beside Ray Tune. For ``recovery.py``; needs root.

The machines are network namespaces (``tests/support/netns_cluster``): a head and two workers with one slot
each, so that one is free when the other is hit. First ours has its turn, fault after fault, then Ray Tune, on
the same cluster, with the trainer's own steps and a checkpoint every so many of them. What fell is brought up
again before the next fault, and who trains may warm up there. Ours keeps its checkpoints in an S3 server on
that network; Tune keeps them in a folder that all machines share and no fault touches, which favours it.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from contenders import EVERY, STEPS, TURN_S, Contender, Cost, Ours, RayTune
from following import Attempt, lost_steps
from harness import BenchmarkFailed, digits_spec, median, wait_for
from support.fake_metadata import announce
from support.netns_cluster import NetnsCluster, Node, netns_cluster

from trainer.rundir import CheckpointPolicy, Options, RunDir, StartOrder
from trainer.training_process import TrainingProcess

PROFILE = "fast"
"""Of Ray's health checks, see docs/operations.md."""
STARTS = 2

Act = Callable[[NetnsCluster, Node], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What happens to the node that trains."""

    begin: Act
    end: Act | None = None
    seconds: float = 0.0
    """From one to the other."""
    announced: bool = False
    """It ends as soon as the training is elsewhere, if that is sooner."""


def _raylets(node: Node) -> list[psutil.Process]:
    return [process for process in node.machine.processes("raylet") if process.name() == "raylet"]


def _thaw_raylet(cluster: NetnsCluster, node: Node) -> None:
    for raylet in _raylets(node):
        with contextlib.suppress(psutil.NoSuchProcess):
            raylet.resume()


def _link_down(seconds: float) -> Fault:
    return Fault(
        begin=lambda cluster, node: node.machine.unplug(),
        end=lambda cluster, node: node.machine.plug_in(),
        seconds=seconds,
    )


def _notice(seconds: float) -> Fault:
    return Fault(
        begin=lambda cluster, node: announce(cluster.notice_file(node), seconds),
        end=lambda cluster, node: node.power_off(),
        seconds=seconds,
        announced=True,
    )


FAULTS: Mapping[str, Fault] = {
    "node killed": Fault(begin=lambda cluster, node: node.power_off()),
    "raylet frozen 20 s": Fault(
        begin=lambda cluster, node: [raylet.suspend() for raylet in _raylets(node)],
        end=_thaw_raylet,
        seconds=20.0,
    ),
    "link down 20 s": _link_down(20.0),
    "link down 90 s": _link_down(90.0),
    "notice of 120 s": _notice(120.0),
    "notice of 30 s": _notice(30.0),
}
DIRECTOR = "controller killed"
"""Of whoever decides what trains: our controller, Tune's driver."""
NAMES = (*FAULTS, DIRECTOR)
UNHEARD = "notice of 120 s"
"""Ray Tune hears of no notice, and trains until the power is cut: one of 30 s shows that sooner."""


def measure(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """Let each fault happen to ours, then to Ray Tune, and return what each cost.

    Args:
        names: Some of ``NAMES``, in any order.
    """
    chosen = [name for name in NAMES if name in names]
    start_up_s = _start_up_s(folder / "start-up")
    costs: dict[str, dict[str, Any]] = {name: {} for name in chosen}
    failures: list[str] = []
    with netns_cluster(folder, workers=2, chain=False) as cluster:
        _mend(cluster)
        for who, enter in (("ours", Ours), ("ray_tune", RayTune)):
            contender = enter(cluster, folder / who)
            try:
                for name in chosen:
                    if who == "ray_tune" and name == UNHEARD:
                        continue
                    contender.settle()
                    cost = contender.lose_director() if name == DIRECTOR else hit(cluster, contender, name)
                    costs[name][who] = asdict(cost)
                    _tell(name, who, cost)
                    _mend(cluster)
            except BenchmarkFailed as error:  # what the others came to is worth knowing all the same
                failures.append(f"{who}, {name}: {error}")
                print(failures[-1], file=sys.stderr, flush=True)
            finally:
                contender.close()
    for both in costs.values():
        if both.keys() == {"ours", "ray_tune"}:
            both["ratio"] = round(both["ours"]["again_s"] / both["ray_tune"]["again_s"], 3)
    figures = {"start_up_s": start_up_s, "every": EVERY, "profile": PROFILE, "faults": costs}
    return figures | ({"failures": failures} if failures else {})


def _mend(cluster: NetnsCluster) -> None:
    """Bring up what fell; where a machine is much too busy, the health checks may fell it again."""
    try:
        try:
            cluster.mend(PROFILE)
        except AssertionError:
            cluster.mend(PROFILE)
    except AssertionError as error:
        raise BenchmarkFailed(str(error)) from error


def hit(cluster: NetnsCluster, contender: Contender, name: str) -> Cost:
    """Let the fault happen to the node that trains, and follow the training elsewhere."""
    fault, attempts = FAULTS[name], contender.attempts
    number, node = len(attempts.all) - 1, contender.node()
    old = attempts.all[number]
    attempts.wait(lambda: old.newest % EVERY == EVERY // 2, "the middle between two checkpoints", 60.0)
    struck_at = time.time()
    fault.begin(cluster, node)
    over = fault.end is None

    def elsewhere() -> bool:
        return len(attempts.all) > number + 1 and bool(attempts.all[number + 1].losses)

    def done() -> bool:
        nonlocal over
        if not over and (time.time() >= struck_at + fault.seconds or (fault.announced and elsewhere())):
            assert fault.end is not None
            fault.end(cluster, node)
            over = True
        return over and elsewhere()

    attempts.wait(done, f"the first step after {name}", TURN_S)
    new = attempts.all[number + 1]
    # Who was cut off ends once it finds out: what it trained until then was for nothing.
    attempts.wait(lambda: not node.up, f"the end of the node that had {name}", TURN_S)
    attempts.wait(lambda: attempts.all[-1].newest >= new.resumed + EVERY, "more steps", TURN_S)
    if new.resumed == 0:
        raise BenchmarkFailed(f"after {name} it began from nothing")
    again_at = new.seen_at[0]
    cut_off = name.startswith(("link", "raylet"))
    return Cost(
        again_s=round(again_at - struck_at, 2),
        lost_steps=lost_steps(old, new),
        detect_s=round(contender.detected_s(struck_at, number), 2),
        gap_s=None if cut_off else round(again_at - max(at for at in old.seen_at if at < again_at), 2),
        restarts=len(attempts.all) - number - 1,
    )


def _start_up_s(folder: Path) -> float:
    """From the start of a training process to its first step, with all that a node caches there."""
    taken = []
    for number in range(STARTS + 1):
        run_dir = RunDir(folder / str(number))
        run_dir.checkpoints.mkdir(parents=True)
        run_dir.spec.write_text(digits_spec(STEPS).model_dump_json())
        options = Options(threads=1, cache_dir=str(folder / "cache"), checkpoint=CheckpointPolicy())
        run_dir.options.write_text(options.model_dump_json())
        run_dir.order_start(StartOrder(resume=None))
        attempt, began = Attempt(run_dir.root), time.time()
        process = TrainingProcess(extra={"OMP_NUM_THREADS": "1"})
        try:
            process.begin(run_dir.root)
            wait_for(attempt.stepped, "a first step", timeout_s=120.0, every_s=0.02)
            taken.append(attempt.seen_at[0] - began)
        finally:
            process.kill()
            attempt.close()
    return median(taken[1:], 2)  # the first one fills the cache


def _tell(name: str, who: str, cost: Cost) -> None:
    parts = ", ".join(f"{key} {value}" for key, value in asdict(cost).items() if value not in (None, ""))
    print(f"{name}, {who}: {parts}", file=sys.stderr, flush=True)
