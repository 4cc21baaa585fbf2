"""A person's day with ``orchestrate``: start, detach, look, come back, cancel, export. Nothing is mocked."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from support.cluster import wait_for
from support.gate import Gate
from support.single_file import write_single_file

from orchestrator.on_ray import local_ray

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def orchestrate(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orchestrator", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=400,
    )


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A home for the local cluster, which is ended afterwards."""
    monkeypatch.setenv("ORCHESTRATE_HOME", str(tmp_path / "home"))
    yield tmp_path
    if cluster := local_ray.find():
        local_ray.stop(cluster)


def test_detach_come_back_and_find_one_run_failed_alone(world: Path, home: Path) -> None:
    gate = Gate(home)
    # Of a single file, which modules it has is only known once it is loaded: on a node.
    shutil.copytree(world / "base", home / "base")
    write_single_file(world / "base", home / "base.safetensors")
    (home / "grid.yaml").write_text(f"""
name: day
parameters: {{targets: {{values: [[to_q, to_v], [nothing_is_called_so]]}}}}
base: {{model: base.safetensors, resolution: 32, max_train_steps: 60, train_batch_size: 2, rank: 2}}
dataset: {{path: {world / "images"}}}
resources: {{gpus: 0, cpus: 1}}
checkpoint: {{every: 10}}
{gate.grid}""")
    refused = orchestrate(home, "sweep", "grid.yaml", "-y", "--set", "resources.cpus=100000")
    assert (refused.returncode, "E2602" in refused.stderr) == (3, True), refused.stderr
    first = Watched(home, "sweep", "grid.yaml", "-y")  # the name is still free
    wait_for("a run that trains", lambda: "RUNNING step" in first.seen, 180)
    cluster = local_ray.find()
    assert cluster is not None
    names = actor_names(cluster)
    assert "lora/day/controller" in names
    assert any(name.startswith("lora/day/slot/node-1/") for name in names)
    wait_for("step counters", lambda: "ray_orch_steps_total" in metrics(cluster), 60)

    first.process.send_signal(signal.SIGINT)
    assert first.process.wait(60) == 130
    assert "Detached. The sweep goes on." in first.seen
    gate.open()

    again = orchestrate(home, "sweep", "grid.yaml", "-y")
    assert again.returncode == 100, again.stderr
    assert "submitted before, unchanged" in again.stderr
    assert "no module of the model ends in" in again.stderr or "nothing_is_called_so" in again.stderr

    status = json.loads(orchestrate(home, "status", "day", "-o", "json").stdout)
    assert [(run["status"], run["attempts"]) for run in status["runs"]] == [("SUCCEEDED", 1), ("FAILED", 1)]
    assert "nothing_is_called_so" in status["runs"][1]["detail"]
    assert status["best"] == status["runs"][0]["run"]

    why = orchestrate(home, "why", "day/0", "--timeline").stdout
    assert "Never interrupted; SUCCEEDED at step 60 of 60." in why
    assert "step 60 committed by attempt 1" in why
    assert "nothing_is_called_so" in orchestrate(home, "logs", "day/1").stdout

    over = orchestrate(home, "cancel", "day", "-y")
    assert over.stdout.splitlines() == [f"{run['run']}: {run['status']}" for run in status["runs"]]

    exported = orchestrate(home, "export", "day", "--best")
    assert exported.returncode == 0, exported.stderr
    assert Path(home, exported.stdout.strip()).exists()
    refused = orchestrate(home, "export", "day", "--best")
    assert refused.returncode == 2
    assert "is there already" in refused.stderr


def test_a_cancelled_run_saves_itself_first(world: Path, home: Path) -> None:
    (home / "grid.yaml").write_text(f"""
name: cut
parameters: {{seed: {{values: [1, 2]}}}}
base: {{model: {world / "base"}, resolution: 32, max_train_steps: 1000000, train_batch_size: 2, rank: 2}}
dataset: {{path: {world / "images"}}}
resources: {{gpus: 0, cpus: 1, max_concurrent: 1}}
checkpoint: {{every: 1000000}}
""")
    started = orchestrate(home, "sweep", "grid.yaml", "-y", "--detach")
    assert started.returncode == 0, started.stderr

    def rows() -> list[dict[str, Any]]:
        return json.loads(orchestrate(home, "status", "cut", "-o", "json").stdout)["runs"]

    wait_for("a step", lambda: rows()[0]["step"] > 3, 180)
    assert orchestrate(home, "cancel", "cut", "-y").returncode == 0
    wait_for("the end of both runs", lambda: {row["status"] for row in rows()} == {"CANCELLED"}, 60)

    saved, never_started = rows()
    assert 3 < saved["committed_step"] < 1000000
    assert never_started["attempts"] == 0


class Watched:
    """A command whose stderr is collected while it runs."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator", *arguments],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        self.seen = ""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            for line in stream:
                self.seen += line


def actor_names(cluster: local_ray.LocalRay) -> list[str]:
    """Names as the dashboard's Actors page gets them."""
    actors = json.loads(fetch(f"http://{cluster.dashboard}/logical/actors"))["data"]["actors"]
    return [actor["name"] for actor in actors.values()]


def metrics(cluster: local_ray.LocalRay) -> str:
    """Everything that Prometheus would scrape."""
    nodes = json.loads(fetch(f"http://{cluster.dashboard}/nodes?view=summary"))["data"]["summary"]
    ports = {node["raylet"]["metricsExportPort"] for node in nodes if "raylet" in node}
    return "\n".join(fetch(f"http://127.0.0.1:{port}/metrics") for port in ports if port)


def fetch(url: str) -> str:
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return str(answer.read().decode())
