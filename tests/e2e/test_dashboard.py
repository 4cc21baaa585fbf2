"""What who operates the cluster sees: a sweep that is a Ray job, on the real dashboard, with its token."""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from support.cluster import running_cluster, wait_for
from support.gate import Gate

from orchestrator.on_ray.local_ray import LocalRay

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

JOB = "sweep-day"


def test_a_sweep_that_is_a_ray_job_shows_its_actors_its_progress_and_its_numbers(
    world: Path, tmp_path: Path
) -> None:
    gate, store = Gate(tmp_path), f"file://{tmp_path / 'store'}"
    grid = tmp_path / "grid.yaml"
    grid.write_text(f"""
name: day
parameters: {{seed: {{values: [1, 2]}}}}
base: {{model: {world / "base"}, resolution: 32, max_train_steps: 20, train_batch_size: 2, rank: 2}}
dataset: {{path: {world / "images"}}}
storage: {{url: {store}}}
resources: {{gpus: 0, cpus: 1, max_concurrent: 2, price_per_hour: 0.5}}
checkpoint: {{every: 10}}
{gate.grid}""")
    with running_cluster(tmp_path / "home", nodes=3, cpus=1) as cluster:
        submit(cluster, "orchestrate", "sweep", str(grid), "-y", "--address", "auto")
        wait_for("progress of both runs", lambda: len(training(cluster)) == 2, 180)

        names = {actor["name"]: actor for actor in actors(cluster)}
        assert names["lora/day/controller"]["state"] == "ALIVE"
        slots = [name for name in names if name.startswith("lora/day/slot/node-")]
        assert len(slots) == 2
        assert {names[slot]["reprName"] for slot in slots} == set(slots)
        run_ids = runs(cluster, store)
        attempts = {f"lora/day/{run_id}#a1" for run_id in run_ids}
        wait_for("the attempts as tasks", lambda: attempts <= task_names(cluster), 60)
        agents = [names[slot]["actorId"] for slot in slots]
        wait_for(
            "the attempts in the agents' logs",
            lambda: (
                attempts == {a for a in attempts for i in agents if f"{a} begins" in actor_log(cluster, i)}
            ),
            60,
        )
        assert job(cluster)["metadata"]["sweep"] == "day"

        assert "Attempt 1 trains on node-" in orchestrate(cluster, "explain", "day/0", "--store", store)

        left = {run_id: node for node, run_id in busy(cluster, store).items()}[run_ids[0]]
        orchestrate(cluster, "drain", left, "--deadline", "60", "--store", store)
        wait_for("its run on the third node", lambda: moved(cluster, store, run_ids, left), 120)
        wait_for("the end's reason as a metric", lambda: has_ended(cluster, "DRAINED"), 60)
        wait_for("what it costs", lambda: "ray_orch_spend_usd{" in metrics(cluster), 60)
        told = run([sys.executable, "-m", "orchestrator", "events", "day", "--store", store])
        assert f"node {left} is to be left alone: attempts there get 60 s to end" in told
        assert "DRAINED" in told

        gate.open()
        wait_for("the job's end", lambda: job(cluster)["status"] in ("SUCCEEDED", "FAILED"), 120)
        assert job(cluster)["status"] == "SUCCEEDED", job_log(cluster)
        assert job_log(cluster).count("SUCCEEDED") >= 2


def submit(cluster: LocalRay, program: str, *arguments: str) -> None:
    """``ray job submit``, as an operator types it."""
    to = ["--address", f"http://{cluster.dashboard}", "--no-wait", "--submission-id", JOB]
    about = ["--metadata-json", '{"sweep": "day"}']
    command = [script("ray"), "job", "submit", *to, *about, "--", script(program), *arguments]
    said: list[str] = []

    def submitted() -> bool:
        """Whether the job is there: on a busy machine the dashboard takes a while to answer."""
        done = subprocess.run(command, timeout=120, capture_output=True, text=True)
        said.append(done.stdout + done.stderr)
        return done.returncode == 0 or "already exists" in said[-1]

    try:
        wait_for("the job to be taken", submitted, 120)
    except AssertionError as error:
        raise AssertionError(said[-1]) from error


def script(name: str) -> str:
    """A program of this environment."""
    return str(Path(sys.executable).parent / name)


def orchestrate(cluster: LocalRay, *arguments: str) -> str:
    return run([sys.executable, "-m", "orchestrator", *arguments, "--address", cluster.address])


def run(command: list[str]) -> str:
    return subprocess.run(command, check=True, timeout=120, capture_output=True, text=True).stdout


def busy(cluster: LocalRay, store: str) -> dict[str, str]:
    """The run that each busy node trains."""
    rows = json.loads(orchestrate(cluster, "nodes", "day", "-o", "json", "--store", store))["nodes"]
    return {row["node"]: row["runs"][0] for row in rows if row["runs"]}


def moved(cluster: LocalRay, store: str, run_ids: list[str], left: str) -> bool:
    now = busy(cluster, store)
    return left not in now and set(now.values()) == set(run_ids)


def has_ended(cluster: LocalRay, reason: str) -> bool:
    ends = [line for line in metrics(cluster).splitlines() if line.startswith("ray_orch_attempts_total{")]
    return any(f'reason="{reason}"' in line for line in ends)


def runs(cluster: LocalRay, store: str) -> list[str]:
    shown = json.loads(orchestrate(cluster, "status", "day", "-o", "json", "--store", store))
    return [row["run"] for row in shown["runs"]]


def job(cluster: LocalRay) -> dict[str, Any]:
    return fetch_json(cluster, f"/api/jobs/{JOB}")


def job_log(cluster: LocalRay) -> str:
    return str(fetch_json(cluster, f"/api/jobs/{JOB}/logs")["logs"])


def training(cluster: LocalRay) -> set[str]:
    """The runs of which the job's log has told that they train."""
    return {line.split(":")[0] for line in job_log(cluster).splitlines() if ": RUNNING step" in line}


def actors(cluster: LocalRay) -> list[dict[str, Any]]:
    """As the Actors page gets them."""
    return list(fetch_json(cluster, "/logical/actors")["data"]["actors"].values())


def actor_log(cluster: LocalRay, actor_id: str) -> str:
    """As the Logs page gets it."""
    where = f"actor_id={actor_id}&suffix=out&lines=1000"
    return fetch(f"http://{cluster.dashboard}/api/v0/logs/file?{where}")


def task_names(cluster: LocalRay) -> set[str]:
    tasks = fetch_json(cluster, "/api/v0/tasks?limit=10000")["data"]["result"]["result"]
    return {task["name"] for task in tasks}


def metrics(cluster: LocalRay) -> str:
    """Everything that Prometheus would scrape."""
    nodes = fetch_json(cluster, "/nodes?view=summary")["data"]["summary"]
    ports = {node["raylet"]["metricsExportPort"] for node in nodes if "raylet" in node}
    return "\n".join(fetch(f"http://127.0.0.1:{port}/metrics") for port in ports if port)


def fetch_json(cluster: LocalRay, path: str) -> dict[str, Any]:
    return dict(json.loads(fetch(f"http://{cluster.dashboard}{path}")))


def fetch(url: str) -> str:
    """What is at a url, asked again where the connection breaks: the dashboard restarts parts of itself."""
    return wait_for(f"an answer from {url}", lambda: fetched(url), 60)


def fetched(url: str) -> str | None:
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text().strip()
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=20) as reply:
            return str(reply.read().decode())
    except urllib.error.HTTPError:
        raise
    except (ConnectionError, TimeoutError, urllib.error.URLError):
        return None
