"""Head, controller and every machine may die: who supervises needs the store alone to bring all back."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.cluster import descendants, kill_cluster, wait_for
from support.evidence import adapter, litter, trained_alone
from support.gate import Gate

from orchestrator import local_ray
from orchestrator.submission import submit
from orchestrator.sweep import load
from storage.log import run_log
from storage.records import EndReason, Outcome
from storage.url import open_store

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_a_sweep_whose_whole_cluster_is_killed_is_brought_back_by_its_supervisor(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures: dict[str, Any]
) -> None:
    monkeypatch.setenv("ORCHESTRATE_HOME", str(tmp_path / "home"))
    gate = Gate(tmp_path)
    (tmp_path / "grid.yaml").write_text(f"""
name: watched
parameters: {{seed: {{values: [0, 1]}}}}
base: {{model: {world / "base"}, resolution: 32, max_train_steps: 30, train_batch_size: 2, rank: 4}}
dataset: {{path: {world / "images"}}}
storage: {{url: "file://{tmp_path / "store"}"}}
resources: {{gpus: 0, cpus: 1}}
checkpoint: {{every: 5, grace_s: 1}}
{gate.grid}""")
    sweep = load(tmp_path / "grid.yaml")
    store = open_store(sweep.storage.url)
    submit(sweep, store)
    run_ids = [run.run_id for run in sweep.runs]
    command = [sys.executable, "-m", "orchestrator", "supervise", sweep.name, "--store", store.url]
    log = tmp_path / "supervise.log"
    with log.open("wb") as output, trained_alone(sweep.runs[0].spec, tmp_path) as calm:
        supervisor = subprocess.Popen([*command, "--address", "local"], stderr=output, stdout=output)
        seen: set[int] = set()
        try:
            wait_for(
                "committed work of both runs",
                lambda: all(run_log(store, run_id).refresh().committed_step >= 10 for run_id in run_ids),
                180,
            )
            first = local_ray.find()
            assert first is not None
            seen |= {first.host_pid, *descendants(first.host_pid)}
            kill_cluster(first)
            committed = {run_id: run_log(store, run_id).refresh().committed_step for run_id in run_ids}
            second = wait_for(
                "another cluster",
                lambda: (c := local_ray.find()) and c.host_pid != first.host_pid and c,
                120,
            )
            gate.open()
            assert supervisor.wait(300) == 0, log.read_text()
            seen |= {second.host_pid, *descendants(second.host_pid), *descendants(os.getpid())}
            expected = calm()
        finally:
            supervisor.kill()
            supervisor.wait()
            if cluster := local_ray.find():
                seen |= {cluster.host_pid, *descendants(cluster.host_pid)}
                local_ray.stop(cluster)

    told = log.read_text()
    assert told.count("started a head at") == 2, told
    assert told.count("resuming watched at") >= 2
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
    figures["supervised_recoveries"] = 1
