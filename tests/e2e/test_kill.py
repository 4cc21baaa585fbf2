"""The project's proof: kill everything that can be killed, and compare the bytes."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.cluster import descendants, kill_cluster, running_cluster, trainers, wait_for
from support.evidence import adapter, litter, trained_alone
from support.gate import Gate
from support.s3_servers import S3Server

from orchestrator.errors import OrchestrateError
from orchestrator.grid.submission import submit
from orchestrator.grid.sweep import Sweep, load
from orchestrator.launching import launch
from orchestrator.on_ray import local_ray
from orchestrator.on_ray.local_ray import LocalRay
from orchestrator.on_ray.scratch import LOCK
from orchestrator.reports.why import interruptions
from storage.log import RunLog, run_log
from storage.object_store import ObjectStore
from storage.probe import open_probed
from storage.records import Outcome
from storage.run_state import Attempt, RunState
from storage.url import open_store

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

STEPS = 120
KILLS = (*("trainer", "node", "agent", "sigterm") * 2, "trainer", "node")


@pytest.mark.parametrize(
    ("optimizer", "bucket"), [("adamw", "radosgw"), ("adamw8bit", "rclone")], indirect=["bucket"]
)
def test_a_run_killed_ten_times_ends_in_the_same_bytes(
    optimizer: str, bucket: S3Server, world: Path, tmp_path: Path, figures: dict[str, Any]
) -> None:
    gate = Gate(tmp_path)
    base = f"optimizer: {optimizer}, adam8bit_min_size: 64"
    sweep = plan(world, tmp_path, bucket.url_of(f"kill-{optimizer}"), gate, base)
    store, probed = open_probed(sweep.storage.url)
    run_id = sweep.runs[0].run_id
    seed = 20261121
    killed: list[str] = []

    with undisturbed(sweep, tmp_path) as calm, running_cluster(tmp_path / "home", nodes=2, cpus=1) as cluster:
        submit(sweep, store)
        launch.start(sweep, sweep.storage.url, arbitrated=not probed.atomic)
        instants = random.Random(seed)
        for number, victim in enumerate(KILLS):
            # Every third dies while it starts, the others some steps later.
            steps = 0 if number % 3 == 2 else instants.randint(1, 12)
            wait_s = instants.uniform(0.0, 0.5 if steps else 2.0)
            cluster = kill(cluster, victim, run_id, store, steps=steps, wait_s=wait_s)
            killed.append(victim)
        gate.open()
        state = finished(store, run_id, timeout_s=300)
        expected = calm()

    assert state.outcome is Outcome.SUCCEEDED
    assert len(interruptions(state)) >= len(KILLS)
    assert sum(a.committed_step is not None for a in state.attempts) > len(KILLS) // 3, (
        "hardly any was training"
    )
    assert adapter(store, run_id, tmp_path / "killed") == expected
    assert litter(store, run_id, state) == []
    assert probed.atomic == (bucket_kind(bucket) == "radosgw")
    cuts = interruptions(state)
    figures["kills"] = figures.get("kills", 0) + len(killed)
    figures["bit_identical"] = True
    figures.setdefault("lost_steps_max", 0)
    figures["lost_steps_max"] = max(figures["lost_steps_max"], *(cut.lost_steps for cut in cuts))
    figures.setdefault("optimizers", []).append(optimizer)


def test_a_killed_controller_costs_no_trainer_anything(
    world: Path, tmp_path: Path, figures: dict[str, Any]
) -> None:
    gate = Gate(tmp_path)
    sweep = plan(world, tmp_path, f"file://{tmp_path / 'store'}", gate, seeds=4, steps=60)
    store = open_store(sweep.storage.url)
    with running_cluster(tmp_path / "home", nodes=2, cpus=2) as cluster:
        submit(sweep, store)
        controller = launch.start(sweep, sweep.storage.url, arbitrated=False)
        assert not is_on_a_worker(controller.pid(), cluster)
        wait_for(
            "four runs that train", lambda: all(s.running and s.running.started for s in states(sweep)), 120
        )
        before = {p.pid for p in trainers(cluster.host_pid)}
        first_pid = controller.pid()
        os.kill(first_pid, signal.SIGKILL)
        second_pid = wait_for("a new controller", lambda: other_controller(sweep.name, first_pid), 60)
        assert not is_on_a_worker(second_pid, cluster)
        during = {p.pid for p in trainers(cluster.host_pid)}
        gate.open()
        ended = [finished(store, run.run_id, timeout_s=300) for run in sweep.runs]

    assert second_pid != first_pid
    assert before <= during, "a trainer was restarted"
    assert [(len(s.attempts), s.outcome) for s in ended] == [(1, Outcome.SUCCEEDED)] * 4
    for run in sweep.runs:
        kinds = [entry.record.kind for entry in entries(store, run.run_id)]
        assert (kinds.count("claimed"), kinds.count("finished")) == (1, 1)
    figures["controller_kills"] = 1
    figures["restarts_by_controller_kill"] = 0


def test_everything_killed_at_once_resumes_from_the_store_alone(
    world: Path, tmp_path: Path, figures: dict[str, Any]
) -> None:
    gate = Gate(tmp_path)
    sweep = plan(world, tmp_path, f"file://{tmp_path / 'store'}", gate, seeds=2, steps=50)
    store = open_store(sweep.storage.url)
    with running_cluster(tmp_path / "home", nodes=2, cpus=1) as cluster:
        submit(sweep, store)
        launch.start(sweep, sweep.storage.url, arbitrated=False)
        wait_for(
            "committed work of both runs", lambda: all(s.committed_step >= 20 for s in states(sweep)), 120
        )
        kill_cluster(cluster)
    gate.open()
    committed = {run.run_id: run_log(store, run.run_id).refresh().committed_step for run in sweep.runs}

    with running_cluster(tmp_path / "home2", nodes=2, cpus=1) as cluster:
        command = ["resume", sweep.name, "--store", sweep.storage.url, "--address", cluster.address]
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator", *command], capture_output=True, text=True, timeout=400
        )

    assert done.returncode == 0, done.stderr
    for run in sweep.runs:
        state = run_log(store, run.run_id).refresh()
        assert state.outcome is Outcome.SUCCEEDED
        assert len(state.attempts) == 2
        assert state.attempts[1].resumed_from == committed[run.run_id]
    with undisturbed(sweep, tmp_path) as calm:
        assert adapter(store, sweep.runs[0].run_id, tmp_path / "killed") == calm()
    figures["everything_killed"] = 1


def is_on_a_worker(pid: int, cluster: LocalRay) -> bool:
    return any(pid in descendants(raylet) for raylet in cluster.raylet_pids.values())


def plan(
    world: Path,
    folder: Path,
    store_url: str,
    gate: Gate,
    base: str = "optimizer: adamw",
    *,
    seeds: int = 1,
    steps: int = STEPS,
) -> Sweep:
    file = folder / "grid.yaml"
    file.write_text(f"""
name: {folder.name.replace("_", "-")[:30].strip("-")}
parameters: {{seed: {{values: {list(range(seeds))}}}}}
base: {{model: {world / "base"}, resolution: 32, max_train_steps: {steps}, train_batch_size: 2, rank: 4,
  gradient_accumulation_steps: 2, lora_dropout: 0.1, learning_rate: 1e-3, lr_scheduler: cosine, {base}}}
dataset: {{path: {world / "images"}, val_fraction: 0.2, caption_dropout: 0.2, random_flip: true}}
storage: {{url: "{store_url}"}}
resources: {{gpus: 0, cpus: 1}}
checkpoint: {{every: 5, grace_s: 1}}
recovery: {{max_failures: 50, backoff_s: 0.1, max_backoff_s: 0.2}}
{gate.grid}""")
    return load(file)


def kill(
    cluster: LocalRay, victim: str, run_id: str, store: ObjectStore, *, steps: int, wait_s: float
) -> LocalRay:
    """Kill ``victim`` under the running attempt: ``wait_s`` after its claim or after ``steps`` of it."""
    log = run_log(store, run_id)
    attempt = wait_for("a running attempt", lambda: log.refresh().running, 120)
    goal = min(attempt.resumed_from + steps, STEPS)
    node = attempt.claimed.node
    raylet = cluster.raylet_pids[node]
    trainer = wait_for(f"a trainer on {node}", lambda: next(iter(trainers(raylet)), None), 60)
    if steps:
        wait_for(f"step {goal}", lambda: log.refresh().committed_step >= goal or over(log, attempt), 120)
    time.sleep(wait_s)  # the random instant itself, not a wait for something
    agent = trainer.ppid()
    disks = open_run_folders(agent)
    doomed = {trainer.pid}
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        match victim:
            case "trainer":
                trainer.kill()
            case "sigterm":
                trainer.send_signal(signal.SIGTERM)
            case "agent":
                doomed |= descendants(agent) | {agent}
                os.kill(agent, signal.SIGKILL)
            case "node":
                doomed |= descendants(raylet) | {raylet}
                local_ray.kill_node(cluster, node)
                cluster = local_ray.add_node(cluster)
    wait_for("the victims' end", lambda: not any(psutil.pid_exists(p) and alive(p) for p in doomed), 60)
    if victim in ("agent", "node"):
        for folder in disks:
            subprocess.run(["rm", "-rf", str(folder)], check=True)
    wait_for("the attempt's end in the log", lambda: over(log, attempt), 90)
    return cluster


def open_run_folders(agent_pid: int) -> list[Path]:
    """The scratch folders of an agent, which holds their locks: its node's disk, as far as runs go."""
    files = [Path(file.path) for file in psutil.Process(agent_pid).open_files()]
    found = [file.parent for file in files if file.name == LOCK]
    assert found
    return found


def over(log: RunLog, attempt: Attempt) -> bool:
    state = log.refresh()
    return state.running is None or state.attempt > attempt.number


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def states(sweep: Sweep) -> list[RunState]:
    store = open_store(sweep.storage.url)
    return [run_log(store, run.run_id).refresh() for run in sweep.runs]


def entries(store: ObjectStore, run_id: str) -> tuple[Any, ...]:
    log = run_log(store, run_id)
    log.refresh()
    return log.entries()


def finished(store: ObjectStore, run_id: str, timeout_s: float) -> RunState:
    log = run_log(store, run_id)
    wait_for(f"the end of {run_id}", lambda: log.refresh().finished, timeout_s)
    wait_for("what it left to be deleted", lambda: not log.refresh().retired, 60)
    return log.state


def other_controller(sweep: str, than: int) -> int | None:
    controller = launch.find_controller(sweep)
    try:
        pid = controller.pid() if controller else None
    except OrchestrateError:
        return None
    return pid if pid != than else None


def undisturbed(sweep: Sweep, folder: Path) -> contextlib.AbstractContextManager[Callable[[], str]]:
    """Train the sweep's first run again, alone and without a kill."""
    return trained_alone(sweep.runs[0].spec, folder)


def bucket_kind(bucket: S3Server) -> str:
    return "rclone" if len(bucket.pids) == 1 else "radosgw"
