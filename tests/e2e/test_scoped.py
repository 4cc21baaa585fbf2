"""A sweep on nodes that hold no credentials: killed, resumed, equal in bytes, and no secret anywhere."""

import contextlib
import os
import shutil
import urllib.request
from pathlib import Path

import psutil
import pytest
from e2e.test_kill import adapter, finished, litter, over, plan, undisturbed
from support.cluster import running_cluster, trainers, wait_for
from support.gate import Gate
from support.s3_servers import SECRET, S3Server

from orchestrator.errors import OrchestrateError, PreflightFailed
from orchestrator.grid.submission import submit
from orchestrator.grid.sweep import load
from orchestrator.launching import launch
from orchestrator.on_ray.local_ray import LocalRay
from storage.log import run_log
from storage.object_store import ObjectStore
from storage.probe import open_probed
from storage.records import Outcome

SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@pytest.mark.parametrize("bucket", ["radosgw"], indirect=True)
def test_a_killed_run_of_nodes_without_credentials_ends_in_the_same_bytes(
    bucket: S3Server, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "nodes"))  # what nodes fetch is cached there
    mine = tmp_path / "world"
    shutil.copytree(world, mine)
    gate = Gate(tmp_path)
    plan(mine, tmp_path, bucket.url_of("scoped"), gate, steps=30)
    sweep = load(tmp_path / "grid.yaml", overrides=["storage.credentials=scoped"])
    run_id = sweep.runs[0].run_id
    store, probed = open_probed(sweep.storage.url)
    assert probed.atomic
    submit(sweep, store)
    (mine / "images").rename(mine / "elsewhere")  # nodes get it from the store, by what they are granted

    with running_cluster(tmp_path / "home", nodes=1, cpus=1) as cluster:
        launch.start(sweep, sweep.storage.url, arbitrated=False)
        for number in range(2):
            kill_trainer_after_a_commit(cluster, run_id, store, attempt=number + 1)
        environments = [trainer.environ() for trainer in trainers(cluster.host_pid)]
        gate.open()
        state = finished(store, run_id, timeout_s=300)
        seen = everything_ray_shows(cluster)

    assert state.outcome is Outcome.SUCCEEDED
    assert len(state.attempts) == 3
    assert [attempt.started is not None for attempt in state.attempts] == [True] * 3
    (mine / "elsewhere").rename(mine / "images")
    with undisturbed(sweep, tmp_path) as calm:
        assert adapter(store, run_id, tmp_path / "killed") == calm()
    assert litter(store, run_id, state) == []
    assert list(store.unfinished("")) == []
    assert environments
    assert not [name for env in environments for name in env if name in SECRETS]
    stored = {info.key: store.get(info.key) for info in store.list("runs/") if "/data/" not in info.key}
    assert any("/logs/" in key for key in stored)
    assert any("/events/" in key for key in stored)
    for place, text in (*stored.items(), *seen.items()):
        for canary in (SECRET.encode(), b"X-Amz-Signature="):
            assert canary not in text, f"{canary!r} in {place}"


@pytest.mark.parametrize("bucket", ["rclone"], indirect=True)
def test_a_store_that_enforces_too_little_is_refused(bucket: S3Server, world: Path, tmp_path: Path) -> None:
    plan(world, tmp_path, bucket.url_of("scoped"), Gate(tmp_path))
    sweep = load(tmp_path / "grid.yaml", overrides=["storage.credentials=scoped"])
    store, probed = open_probed(sweep.storage.url)
    with pytest.raises(PreflightFailed, match="E2605"):
        launch.start(sweep, sweep.storage.url, arbitrated=not probed.atomic)
    submit(sweep, store)
    with (
        running_cluster(tmp_path / "home", nodes=1, cpus=1),
        # Even if the race had not shown it: the controller tries what it is to rely on.
        pytest.raises(OrchestrateError, match="needs a bucket whose server keeps"),
    ):
        launch.start(sweep, sweep.storage.url, arbitrated=False)


def kill_trainer_after_a_commit(cluster: LocalRay, run_id: str, store: ObjectStore, attempt: int) -> None:
    log = run_log(store, run_id)
    wait_for(
        f"a commit of attempt {attempt}",
        lambda: any(c.attempt == attempt for c in log.refresh().checkpoints),
        180,
    )
    running = log.state.running
    assert running is not None
    assert running.number == attempt
    for trainer in trainers(cluster.host_pid):  # one trains; a spare that goes with it does no harm
        with contextlib.suppress(psutil.NoSuchProcess):
            trainer.kill()
    wait_for("its end in the log", lambda: over(log, running), 90)


def everything_ray_shows(cluster: LocalRay) -> dict[str, bytes]:
    """What the dashboard says of actors, jobs, nodes and tasks, and every log file of the session."""
    import ray

    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()
    found: dict[str, bytes] = {}
    for path in (
        "logical/actors",
        "api/v0/actors?detail=1",
        "api/v0/tasks?detail=1",
        "api/v0/workers?detail=1",
        "api/jobs/",
        "nodes?view=summary",
    ):
        request = urllib.request.Request(
            f"http://{cluster.dashboard}/{path}", headers={"Authorization": f"Bearer {token}"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            found[path] = answer.read()
    assert b"lora/" in found["api/v0/actors?detail=1"]
    logs = Path(ray._private.worker.global_worker.node.get_logs_dir_path())
    found |= {str(path): path.read_bytes() for path in logs.rglob("*") if path.is_file()}
    assert any(b"attempt 1" in text for text in found.values()), "the controller's log is among them"
    return found
