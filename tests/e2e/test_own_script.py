"""A training script that knows nothing of us, swept: killed on its node, resumed, exported. No mocks."""

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.cluster import descendants, wait_for

from orchestrator.on_ray import local_ray
from storage.directory import DirectoryStore
from storage.log import run_log

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

EXAMPLE = Path(__file__).parents[2] / "examples" / "own-script"


def orchestrate(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A home for the local cluster, which is ended afterwards."""
    monkeypatch.setenv("ORCHESTRATE_HOME", str(tmp_path / "home"))
    yield tmp_path
    if cluster := local_ray.find():
        local_ray.stop(cluster)


def test_a_script_of_ones_own_is_swept_killed_and_resumed(home: Path) -> None:
    shutil.copytree(EXAMPLE, home / "mine")
    script, go = home / "mine" / "train.py", home / "go"
    pause = "        time.sleep(args.step_s)\n"
    assert pause in script.read_text()
    held = f"        while step > 30 and not Path({str(go)!r}).exists():\n    {pause}"
    script.write_text(script.read_text().replace(pause, held))
    one, short = "parameters.lr={value: 0.01}", "command.steps=100"
    only = ("--set", one, "--set", short, "--set", "name=own")
    orchestrate(home, "sweep", "mine/grid.yaml", "-y", "--detach", *only)

    (run,) = json.loads(orchestrate(home, "status", "own", "-o", "json"))["runs"]
    log = run_log(DirectoryStore(home / "orchestrate-store"), run["run"])
    wait_for("its first checkpoint in the store", lambda: log.refresh().committed_step >= 20, 240)
    cluster = local_ray.find()
    assert cluster is not None
    player = wait_for("the process that plays it", lambda: playing(cluster.host_pid), 60)
    player.kill()
    go.touch()
    wait_for("its end", lambda: log.refresh().finished, 240)
    (end,) = json.loads(orchestrate(home, "status", "own", "-o", "json"))["runs"]
    assert (end["status"], end["step"], end["attempts"]) == ("SUCCEEDED", 100, 2)
    assert end["metric"] is not None, "of the line of JSON that it prints"
    exported = home / orchestrate(home, "export", "own", "--best").strip()
    assert [file.name for file in exported.iterdir()] == ["pytorch_lora_weights.safetensors"]


def playing(root_pid: int) -> psutil.Process | None:
    for pid in descendants(root_pid):
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            if "trainer.command" in process.cmdline():
                return process
    return None
