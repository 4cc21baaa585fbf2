"""Head, controller and every machine may die: who supervises needs the store alone to bring all back."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.cluster import descendants, kill_cluster, wait_for
from support.evidence import adapter, litter, trained_alone
from support.gate import Gate

from orchestrator.grid.submission import submit
from orchestrator.grid.sweep import load
from orchestrator.on_ray import local_ray
from storage.log import run_log
from storage.records import EndReason, Outcome
from storage.url import open_store

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

EVERY = 4


def lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("head", ["local", "ray start"])
def test_a_sweep_whose_cluster_is_killed_is_brought_back_by_its_supervisor(
    head: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures: dict[str, Any]
) -> None:
    """The local cluster is killed as a whole; of one that ``ray start`` runs only the GCS is.

    The latter's sweep is a file that nobody has submitted.
    """
    monkeypatch.setenv("ORCHESTRATE_HOME", str(tmp_path / "home"))
    gate = Gate(tmp_path)
    (tmp_path / "grid.yaml").write_text(f"""
name: watched
parameters: {{seed: {{values: [0, 1]}}}}
base: {{model: {world / "base"}, resolution: 32, max_train_steps: 16, train_batch_size: 2, rank: 4}}
dataset: {{path: {world / "images"}}}
storage: {{url: "file://{tmp_path / "store"}"}}
resources: {{gpus: 0, cpus: 1}}
checkpoint: {{every: {EVERY}, grace_s: 1}}
{gate.grid}""")
    sweep = load(tmp_path / "grid.yaml")
    store = open_store(sweep.storage.url)
    run_ids = [run.run_id for run in sweep.runs]
    command = [sys.executable, "-m", "orchestrator", "supervise"]
    if head == "local":
        submit(sweep, store)
        options = [sweep.name, "--store", store.url, "--address", "local"]
    else:
        options = [str(tmp_path / "grid.yaml"), *ray_start()]
    log = tmp_path / "supervise.log"
    with log.open("wb") as output, trained_alone(sweep.runs[0].spec, tmp_path) as calm:
        supervisor = subprocess.Popen([*command, *options], stderr=output, stdout=output)
        seen: set[int] = set()
        try:
            wait_for(
                "committed work of both runs",
                lambda: all(run_log(store, run_id).refresh().committed_step >= EVERY for run_id in run_ids),
                180,
            )
            first = local_ray.find()
            seen |= descendants(first.host_pid if first else supervisor.pid)
            if first:
                kill_cluster(first)
            else:
                os.kill(gcs_of(supervisor.pid), signal.SIGKILL)
            wait_for("another head", lambda: log.read_text().count("started a head at") == 2, 180)
            committed = {run_id: run_log(store, run_id).refresh().committed_step for run_id in run_ids}
            gate.open()
            if second := local_ray.find():
                seen |= {second.host_pid, *descendants(second.host_pid)}
            seen |= descendants(supervisor.pid)
            assert supervisor.wait(300) == 0, log.read_text()
            expected = calm()
        finally:
            supervisor.send_signal(signal.SIGTERM)
            supervisor.wait(120)
            if cluster := local_ray.find():
                seen |= {cluster.host_pid, *descendants(cluster.host_pid)}
                local_ray.stop(cluster)

    told = log.read_text()
    assert told.count("started a head at") == 2, told
    assert "watched is over, exit code 0" in told
    for run_id in run_ids:
        over = run_log(store, run_id).refresh()
        assert over.outcome is Outcome.SUCCEEDED
        assert [a.resumed_from for a in over.attempts] == [0, committed[run_id]]
        assert over.attempts[0].ended is not None
        assert over.attempts[0].ended.reason is EndReason.NODE_LOST
        assert litter(store, run_id, over) == []
    assert adapter(store, run_ids[0], tmp_path / "supervised") == expected
    assert [pid for pid in seen if lives(pid)] == [], "processes are left"
    figures["supervised_recoveries"] = figures.get("supervised_recoveries", 0) + 1


def ray_start() -> list[str]:
    """A head that is a worker too, as an operator starts one."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ray = Path(sys.executable).parent / "ray"
    words = f"{ray} start --head --block --port={port} --node-ip-address=127.0.0.1 --num-cpus=2 --num-gpus=0"
    return ["--address", f"127.0.0.1:{port}", "--head", f"{words} --include-dashboard=false"]


def gcs_of(pid: int) -> int:
    """The GCS among the descendants of a process."""
    (found,) = [p.pid for p in psutil.Process(pid).children(recursive=True) if p.name() == "gcs_server"]
    return found
