"""A killed node on a Ray cluster on this machine: ours beside Ray Tune. For ``recovery.py``, without root.

The two take turns, one kill each; a lost node is replaced before the next turn.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from harness import (
    BenchmarkFailed,
    conclude,
    digits_spec,
    median,
    show,
    verdict,
    wait_for,
    wait_until_warm,
)

from orchestrator.grid.submission import submit
from orchestrator.grid.sweep import Sweep, load
from orchestrator.launching import launch
from orchestrator.on_ray import local_ray
from storage.log import RunLog, run_log
from storage.object_store import ObjectStore
from storage.probe import open_probed
from trainer.rundir import RunDir, read_events

EVERY = 20
"""Steps between checkpoints."""
STEPS = 1_000_000
"""More than any turn trains."""
TURN_TIMEOUT_S = 240.0
DRIVER = Path(__file__).resolve().parent / "tune_driver.py"


GOAL = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """One kill, and what became of it. All in seconds."""

    total_s: float
    lost_steps: int
    parts: dict[str, float]


def kill_nodes(kills: int, *, save: bool) -> None:
    """Kill the node that trains, as often, on a cluster on this machine."""
    ours, theirs = [], []
    temporary = tempfile.TemporaryDirectory(prefix="rec-", ignore_cleanup_errors=True)
    with temporary as scratch, _Cluster(Path(scratch)) as cluster:
        for turn in range(kills):
            ours.append(_tell("ours", _ours(cluster, Path(scratch, f"ours-{turn}"))))
            cluster.replace_lost()
            theirs.append(_tell("Ray Tune", _theirs(cluster, Path(scratch, f"tune-{turn}"))))
            cluster.replace_lost()
    figures: dict[str, Any] = {
        "ours_s": median([r.total_s for r in ours]),
        "ray_tune_s": median([r.total_s for r in theirs]),
        "ratio": median([a.total_s / b.total_s for a, b in zip(ours, theirs, strict=True)]),
        **{part: median([r.parts[part] for r in ours]) for part in ours[0].parts},
        **{f"ray_tune_{part}": median([r.parts[part] for r in theirs]) for part in theirs[0].parts},
        "lost_steps": median([r.lost_steps for r in ours], 0),
        "ray_tune_lost_steps": median([r.lost_steps for r in theirs], 0),
        "kills": kills,
    }
    show(
        f"from SIGKILL to the first new step, medians of {kills} kills each",
        ["", "seconds"],
        [[key, f"{value:g}"] for key, value in figures.items() if key.endswith("_s")],
    )
    print(f"ours / Ray Tune: {verdict(figures['ratio'], GOAL)}")
    conclude("recovery_local", figures, save=save)


class _Cluster:
    """A local Ray cluster of its own, in a folder of its own, always with two live worker nodes."""

    def __init__(self, scratch: Path) -> None:
        # Short-lived files of the cluster, the agents and Ray itself go where they are removed with the rest.
        own = {"ORCHESTRATE_HOME": scratch / "ray-home", "HOME": scratch / "home", "TMPDIR": scratch}
        os.environ |= {key: str(value) for key, value in own.items()}
        tempfile.tempdir = None
        self.scratch = scratch
        self.killed: set[str] = set()

    def __enter__(self) -> "_Cluster":
        self.local = local_ray.start(nodes=2, cpus=1)
        try:
            local_ray.connect(self.local.address)
            self._keeper = _keep(self.local)
        except BaseException:
            local_ray.stop(self.local)
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        import ray

        ray.shutdown()
        local_ray.stop(self.local)

    @property
    def live(self) -> list[str]:
        return [name for name in self.local.raylet_pids if name not in self.killed]

    def kill(self, node: str) -> float:
        """Kill a node and return when, in Unix seconds."""
        at = time.time()
        if local_ray.kill_node(self.local, node) == 0:
            raise BenchmarkFailed(f"{node} was gone before it was killed")
        self.killed.add(node)
        return at

    def replace_lost(self) -> None:
        """Wait until what ran is gone, add a node for the lost one, and wait until both slots are free."""
        import ray

        self.local = local_ray.add_node(self.local)
        wait_for(lambda: ray.available_resources().get("CPU", 0.0) == 2.0, "two free slots", timeout_s=60.0)

    def processes(self, node: str, module: str) -> list[psutil.Process]:
        """What runs ``python -m module`` under a node."""
        found = []
        for process in psutil.Process(self.local.raylet_pids[node]).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if module in process.cmdline():
                    found.append(process)
        return found


def _keep(cluster: local_ray.LocalRay) -> Any:
    """Keep the local cluster's host, which ends without a controller, from ending while Tune has its turn."""
    import ray

    class Keeper:
        def ready(self) -> bool:
            return True

    head = next(n["NodeID"] for n in ray.nodes() if "node:__internal_head__" in n["Resources"])
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(head, soft=False)
    options = {"name": "benchmark/controller", "num_cpus": 0, "scheduling_strategy": strategy}
    keeper = ray.remote(Keeper).options(**options).remote()
    ray.get(keeper.ready.remote(), timeout=60.0)
    return keeper


def _ours(cluster: _Cluster, folder: Path) -> Recovery:
    sweep = _sweep(folder)
    run_id = sweep.runs[0].run_id
    store, _ = open_probed(sweep.storage.url)
    submit(sweep, store)
    launch.start(sweep, sweep.storage.url, arbitrated=False)
    log = run_log(store, run_id)
    wait_for(lambda: _committed(log) >= 2 * EVERY, "two checkpoints of ours", timeout_s=TURN_TIMEOUT_S)
    running = log.state.running
    assert running is not None
    before = _attempt_dir(cluster, run_id, 1)
    assert before is not None
    (spare_node,) = [name for name in cluster.live if name != running.claimed.node]
    (spare,) = wait_for(
        lambda: cluster.processes(spare_node, "trainer.process"), f"a spare on {spare_node}", timeout_s=60.0
    )
    wait_until_warm(spare.pid)
    _wait_half_way(before)
    killed_at = cluster.kill(running.claimed.node)
    after, stepped_at = _first_new_step(lambda: _attempt_dir(cluster, run_id, 2))
    recovery = _our_parts(log, after, killed_at, stepped_at, _lost_steps(before, after))
    _cancel(sweep, store, log)
    return recovery


def _our_parts(log: RunLog, after: RunDir, killed_at: float, stepped_at: float, lost_steps: int) -> Recovery:
    attempts = log.refresh().attempts
    ended, claimed = attempts[0].ended, attempts[1].claimed
    assert ended is not None
    ordered_at = after.start.stat().st_mtime
    first_step_s = next(float(event["step_s"]) for event in _events(after, "step"))
    return Recovery(
        total_s=stepped_at - killed_at,
        lost_steps=lost_steps,
        parts={
            "detect_s": ended.at - killed_at,
            "place_s": claimed.at - ended.at,
            "order_s": ordered_at - claimed.at,
            "restore_s": stepped_at - first_step_s - claimed.at,
            "first_step_s": first_step_s,
        },
    )


def _theirs(cluster: _Cluster, folder: Path) -> Recovery:
    (folder / "tries").mkdir(parents=True)
    (folder / "spec.json").write_text(digits_spec(STEPS).model_dump_json())
    log = folder / "driver.log"
    with log.open("wb") as output, _driver(cluster, folder, output) as driver:

        def tries() -> list[RunDir]:
            if driver.poll() is not None:
                raise BenchmarkFailed(f"Ray Tune's driver ended:\n{log.read_text()[-3000:]}")
            return [RunDir(path) for path in (folder / "tries").iterdir()]

        def reported() -> bool:
            return len(list((folder / "tune").glob("recovery/*/checkpoint_*"))) >= 2

        wait_for(lambda: tries() and reported(), "two checkpoints of Ray Tune", timeout_s=TURN_TIMEOUT_S)
        (before,) = tries()
        _wait_half_way(before)
        killed_at = cluster.kill(_node_name((before.root / "node").read_text()))

        def second() -> RunDir | None:
            return next((new for new in tries() if new.root != before.root), None)

        after, stepped_at = _first_new_step(second)
        return Recovery(
            total_s=stepped_at - killed_at,
            lost_steps=_lost_steps(before, after),
            parts={"restart_s": (after.root / "node").stat().st_mtime - killed_at},
        )


@contextlib.contextmanager
def _driver(cluster: _Cluster, folder: Path, output: Any) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, str(DRIVER), cluster.local.address, str(folder), str(EVERY)]
    driver = subprocess.Popen(command, stdout=output, stderr=output, cwd=DRIVER.parent)
    try:
        yield driver
    finally:
        driver.kill()
        driver.wait()


def _sweep(folder: Path) -> Sweep:
    """The same run as Tune trains, as a sweep of one."""
    import json

    folder.mkdir()
    base = digits_spec(STEPS).model_dump(exclude_unset=True)
    file = folder / "grid.yaml"
    rate = base["base"].pop("learning_rate")
    grid = {
        "version": 1,
        "name": folder.name,
        "parameters": {"learning_rate": {"values": [rate]}},
        **base,
        "resources": {"gpus": 0, "cpus": 1},
        "checkpoint": {"every": EVERY},
        "storage": {"url": f"file://{folder / 'store'}"},
    }
    file.write_text(json.dumps(grid))  # JSON is YAML
    return load(file)


def _cancel(sweep: Sweep, store: ObjectStore, log: RunLog) -> None:
    controller = launch.find_controller(sweep.name)
    assert controller is not None
    controller.cancel([run.run_id for run in sweep.runs])
    wait_for(lambda: log.refresh().finished, "the end of the cancelled run", timeout_s=60.0)
    wait_for(lambda: launch.find_controller(sweep.name) is None, "the controller's end", timeout_s=60.0)


def _committed(log: RunLog) -> int:
    state = log.refresh()
    if state.finished or len(state.attempts) > 1:
        raise BenchmarkFailed(f"the run did not train on undisturbed: {state.attempts[-1]}")
    return state.committed_step if state.running and state.running.started else 0


def _attempt_dir(cluster: _Cluster, run_id: str, attempt: int) -> RunDir | None:
    found = list(cluster.scratch.glob(f"orchestrate-*/*/{run_id}-a{attempt}-*"))
    return RunDir(found[0]) if found else None


def _first_new_step(find: Any) -> tuple[RunDir, float]:
    """Wait for the new attempt's first step; returns its run directory and the Unix time."""

    def stepped() -> tuple[RunDir, float] | None:
        run_dir = find()
        return (run_dir, time.time()) if run_dir and any(_events(run_dir, "step")) else None

    found: tuple[RunDir, float] = wait_for(
        stepped, "the first step after the kill", timeout_s=TURN_TIMEOUT_S, every_s=0.01
    )
    return found


def _wait_half_way(run_dir: RunDir) -> None:
    """Wait until the attempt is half way between two checkpoints: neither is killed with more to lose."""

    def half_way() -> bool:
        newest: int = max(event["step"] for event in _events(run_dir, "step"))
        return newest % EVERY == EVERY // 2

    wait_for(half_way, "the middle between two checkpoints", timeout_s=60.0, every_s=0.01)


def _lost_steps(before: RunDir, after: RunDir) -> int:
    """Check that the new attempt resumed and retraces the old one, and return how many steps were lost."""
    known: dict[int, float] = {event["step"]: event["loss"] for event in _events(before, "step")}
    resumed = next(int(event["step"]) for event in _events(after, "started"))
    if resumed == 0:
        raise BenchmarkFailed("the new attempt began from nothing")

    def retraced() -> dict[int, float]:
        return {event["step"]: event["loss"] for event in _events(after, "step")}

    lost = max(known) - resumed
    wait_for(lambda: max(retraced()) >= max(known), "the lost steps", timeout_s=TURN_TIMEOUT_S)
    if differing := [step for step, loss in retraced().items() if known.get(step, loss) != loss]:
        raise BenchmarkFailed(f"step {differing[0]} had another loss when it was trained again")
    return lost


def _events(run_dir: RunDir, kind: str) -> Iterator[dict[str, Any]]:
    return (event for _, event in read_events(run_dir.events) if event["event"] == kind)


def _node_name(node_id: str) -> str:
    import ray

    return next(str(node["NodeName"]) for node in ray.nodes() if node["NodeID"] == node_id)


def _tell(name: str, recovery: Recovery) -> Recovery:
    parts = ", ".join(f"{part} {value:.2f}" for part, value in recovery.parts.items())
    print(f"{name}: {recovery.total_s:.2f} s ({parts}), {recovery.lost_steps} steps lost", file=sys.stderr)
    return recovery
