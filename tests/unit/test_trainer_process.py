"""The real training process: its signals, its stdin, its exit codes, and what a kill costs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.gate import Gate
from support.tiny_world import tiny_spec
from support.training import contents, events, lay_out, newest

from storage.local import step_dir
from trainer.attempt import run_attempt
from trainer.config import RunSpec
from trainer.process import serve
from trainer.rundir import EXIT_BAD_CONFIG, EXIT_COMPLETE, EXIT_PREEMPTED, RunDir
from trainer.stop import Stop

# diffusers' schedulers hand torch tensors to numpy in the old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

DEADLINE_S = 90.0


class Process:
    """``python -m trainer.process`` in a group of its own."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "trainer.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self.stdin, self.stdout = self.popen.stdin, self.popen.stdout

    def begin(self, run_dir: RunDir) -> None:
        self.stdin.write(json.dumps({"run_dir": str(run_dir.root)}).encode() + b"\n")
        self.stdin.flush()

    def exit_code(self) -> int:
        return self.popen.wait(timeout=DEADLINE_S)

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something the process does, which it must do before it ends."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert self.popen.poll() is None, "the process ended too early"
            assert time.monotonic() < deadline
            time.sleep(0.005)


@pytest.fixture
def start() -> Iterator[Callable[[], Process]]:
    started: list[Process] = []

    def make() -> Process:
        started.append(Process())
        return started[-1]

    yield make
    for process in started:
        if process.popen.poll() is None:
            os.killpg(process.popen.pid, signal.SIGKILL)
        with process.popen:
            assert process.stdout.read() == b"", "what it prints belongs into the run's log"


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Gate:
    """No run ends before it is interrupted, however late that is."""
    return Gate(tmp_path_factory.mktemp("gate"))


@pytest.fixture(autouse=True)
def _closed(gate: Gate) -> Iterator[None]:
    yield
    gate.close()


@pytest.fixture(scope="module")
def spec(world: Path, gate: Gate) -> RunSpec:
    return tiny_spec(
        world / "base",
        world / "images",
        base={"max_train_steps": 8, "optimizer": "adamw8bit", "adam8bit_min_size": 64, "ema_decay": 0.9},
        **gate.blocks,
    )


@pytest.fixture(scope="module")
def straight(
    world: Path, spec: RunSpec, gate: Gate, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The final checkpoint of a run that nothing interrupted, trained in this very process."""
    run_dir = lay_out(tmp_path_factory.mktemp("straight") / "run", spec, cache=world / "cache")
    gate.open()
    assert run_attempt(run_dir, Stop()) == EXIT_COMPLETE
    gate.close()
    return contents(newest(run_dir))


def reached(run_dir: RunDir, step: int) -> Callable[[], bool]:
    return lambda: any(event["step"] >= step for event in events(run_dir, "step"))


def test_killed_twice_equals_never_killed(
    world: Path,
    spec: RunSpec,
    straight: dict[str, bytes],
    gate: Gate,
    start: Callable[[], Process],
    tmp_path: Path,
) -> None:
    processes = [start(), start()]  # the second is a warm spare while the first trains
    resume = None
    for number, (process, step) in enumerate(zip(processes, (2, 5), strict=True)):
        run_dir = lay_out(tmp_path / str(number), spec, resume=resume, cache=world / "cache", every_steps=1)
        process.begin(run_dir)
        process.until(reached(run_dir, step))
        os.kill(process.popen.pid, signal.SIGKILL)
        assert process.exit_code() == -signal.SIGKILL
        resume = newest(run_dir)

    last = lay_out(tmp_path / "last", spec, resume=resume, cache=world / "cache")
    gate.open()
    assert run_attempt(last, Stop()) == EXIT_COMPLETE

    assert resume
    assert resume.name >= step_dir(4)
    assert contents(newest(last)) == straight


def test_sigterm_finishes_the_step_saves_it_and_exits_75(
    world: Path,
    spec: RunSpec,
    straight: dict[str, bytes],
    gate: Gate,
    start: Callable[[], Process],
    tmp_path: Path,
) -> None:
    run_dir = lay_out(tmp_path / "run", spec, cache=world / "cache")
    process = start()
    process.begin(run_dir)
    process.until(reached(run_dir, 3))
    os.kill(process.popen.pid, signal.SIGTERM)
    assert process.exit_code() == EXIT_PREEMPTED

    *_, last_step, saved, ended = events(run_dir)
    assert (saved["event"], saved["step"]) == ("checkpoint", last_step["step"])
    assert (ended["event"], ended["step"]) == ("preempted", last_step["step"])
    written = [line[20:] for line in run_dir.log.read_text().splitlines()]
    assert f"loading {world / 'base'}" in written
    assert "training from step 0 of 8 on cpu" in written
    assert written[-1] == f"asked to stop; step {last_step['step']} is saved"
    again = lay_out(tmp_path / "again", spec, resume=newest(run_dir), cache=world / "cache")
    gate.open()
    assert run_attempt(again, Stop()) == EXIT_COMPLETE
    assert contents(newest(again)) == straight


def test_sigterm_while_waiting_for_the_order_to_start_exits_75_with_nothing_saved(
    world: Path, spec: RunSpec, start: Callable[[], Process], tmp_path: Path
) -> None:
    run_dir = lay_out(tmp_path / "run", spec, cache=world / "cache")
    run_dir.start.unlink()
    process = start()
    process.begin(run_dir)
    process.until(run_dir.log.exists)
    os.kill(process.popen.pid, signal.SIGTERM)

    assert process.exit_code() == EXIT_PREEMPTED
    assert list(run_dir.checkpoints.iterdir()) == []


def test_the_end_of_stdin_kills_the_process_and_its_children(
    world: Path, start: Callable[[], Process], tmp_path: Path
) -> None:
    """The evaluate command stands for anything that the process started."""
    pid_file = tmp_path / "pid"
    program = f"import os,time; open({str(pid_file)!r},'w').write(str(os.getpid())); time.sleep(600)"
    spec = tiny_spec(
        world / "base",
        world / "images",
        base={"max_train_steps": 1, "lr_warmup_steps": 0},
        samples={"prompts": ["a dog"], "steps": 1},
        evaluate={"command": ["python", "-c", program]},
    )
    run_dir = lay_out(tmp_path / "run", spec, cache=world / "cache")
    process = start()
    process.begin(run_dir)
    process.until(lambda: pid_file.exists() and pid_file.read_text() != "")

    process.stdin.close()

    assert process.exit_code() == -signal.SIGKILL
    child, deadline = int(pid_file.read_text()), time.monotonic() + DEADLINE_S
    while _alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_missing_base_model_is_code_78_and_says_what_to_give(world: Path, tmp_path: Path) -> None:
    run_dir = lay_out(
        tmp_path / "run", tiny_spec(tmp_path / "nowhere", world / "images"), cache=world / "cache"
    )

    assert serve(run_dir, Stop()) == EXIT_BAD_CONFIG
    assert events(run_dir) == [
        {
            "event": "error",
            "type": "BadInput",
            "message": f"base model {tmp_path / 'nowhere'}: no such file or folder",
            "hint": "base.model is a diffusers folder, a single .safetensors file, "
            "or a hub id such as owner/name",
        }
    ]


def test_the_trainer_imports_no_ray() -> None:
    program = "import sys, trainer.process, trainer.attempt, trainer.export; print('ray' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert shown.stdout.strip() == "False"
