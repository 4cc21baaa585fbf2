"""The entrypoint of worker containers: what becomes of SIGTERM, with a real process that plays Ray."""

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.waiting import DEADLINE_S, wait_until

from orchestrator.notices.own import File
from orchestrator.on_ray.scratch import own_scratch

SCRIPT = Path(__file__).resolve().parents[2] / "infra" / "orchestrate-worker"

WORKER = """
echo $$ >>"$1/started"
trap 'echo told "$1"/orchestrate-*/*/* >>"$1/told"; exit 7' TERM
[ -e "$1/fails" ] && { rm "$1/fails"; exit 3; }
touch "$1/ready"
while :; do sleep 0.05; done
"""


class Node:
    """A container's inside: the entrypoint, what it runs, and an agent with an attempt."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notice = folder / "notice"
        self.started, self.told = folder / "started", folder / "told"
        self.process: subprocess.Popen[str] | None = None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tempfile, "tempdir", str(folder))
            self.attempt = own_scratch() / "cat-0-a1-deadbeef"

    def start(self, stop_s: int) -> subprocess.Popen[str]:
        variables = {
            "TMPDIR": str(self.folder),
            "ORCHESTRATE_NOTICE_FILE": str(self.notice),
            "ORCHESTRATE_STOP_S": str(stop_s),
            "ORCHESTRATE_AGAIN_S": "0",
        }
        self.process = subprocess.Popen(
            [SCRIPT, "sh", "-c", WORKER, "worker", self.folder],
            env={**os.environ, **variables},
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_until((self.folder / "ready").exists, "the worker is up")
        return self.process


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    for pid in map(int, made.started.read_text().split() if made.started.exists() else []):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    if made.process:
        made.process.kill()
        made.process.communicate()


def test_sigterm_is_a_notice_first_and_reaches_ray_when_the_attempts_are_over(node: Node) -> None:
    node.notice.write_text("1\n")  # of the container's life before
    node.attempt.mkdir(parents=True)
    process = node.start(stop_s=600)
    assert not node.notice.exists()

    process.terminate()
    wait_until(node.notice.exists, "the notice is given")
    assert node.notice.read_text() == "595\n"
    assert File(node.notice).poll() is not None
    node.attempt.rmdir()

    _, said = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 7
    assert "no attempt is left here: the worker is stopped" in said
    assert node.attempt.name not in node.told.read_text(), "Ray was stopped over a trainer that saves itself"


@pytest.mark.parametrize("cause", ["time is nearly up", "asked again"])
def test_ray_is_stopped_over_an_attempt_where_there_is_no_time_left(node: Node, cause: str) -> None:
    node.attempt.mkdir(parents=True)
    process = node.start(stop_s=10 if cause == "time is nearly up" else 600)
    process.terminate()
    wait_until(node.notice.exists, "the notice is given")
    if cause == "asked again":
        process.terminate()
    _, said = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 7
    assert f"{cause}: the worker is stopped" in said
    assert node.attempt.name in node.told.read_text()


def test_a_worker_that_ended_with_its_head_is_started_again(node: Node) -> None:
    (node.folder / "fails").touch()
    process = node.start(stop_s=5)
    assert len(node.started.read_text().split()) == 2
    process.terminate()
    _, said = process.communicate(timeout=DEADLINE_S)
    assert "the worker ended with code 3; again in 0 s" in said
    assert process.returncode == 7


@pytest.mark.parametrize(
    ("variables", "code"),
    [({"ORCHESTRATE_STOP_S": "90s"}, 64), ({"ORCHESTRATE_NOTICE_FILE": "/proc/none/notice"}, 73)],
)
def test_what_could_give_no_notice_is_refused_at_the_start(variables: dict[str, str], code: int) -> None:
    done = subprocess.run(
        [SCRIPT, "true"], env={**os.environ, **variables}, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert (done.returncode, "orchestrate-worker: " in done.stderr) == (code, True)
