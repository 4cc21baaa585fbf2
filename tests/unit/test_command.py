"""A program that knows nothing of us, under ``command:``: its folders are checkpoints once they are whole."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from support import foreign_script
from support.attempts import Attempt
from support.runs import claimed, ended, incarnation
from support.waiting import DEADLINE_S, wait_until

from storage.checkpoints import CheckpointStore
from storage.directory import DirectoryStore
from storage.log import run_log
from storage.run_state import RunState
from trainer.config import Command, RunSpec
from trainer.evidence import attributed
from trainer.rundir import (
    EXIT_BAD_CONFIG,
    EXIT_COMPLETE,
    EXIT_PREEMPTED,
    CheckpointPolicy,
    Options,
)
from trainer.supervisor import Assignment, Supervisor
from trainer.training_process import PLAYER, TrainingProcess

RUN = "cat-r16"
EXAMPLE = Path(__file__).parents[2] / "examples" / "own-script"


def light(mode: str, steps: int = 6, *, gate: Path | None = None, **changes: object) -> RunSpec:
    words = ["python", foreign_script.__file__, mode, "{out}", "{steps}", "--resume=latest"]
    words += [f"--gate={gate}"] if gate else []
    given = {
        "words": words,
        "steps": steps,
        "quiet_s": 0.2,
        "result": ["lora.safetensors"],
        **changes,
    }
    return RunSpec(command=Command.model_validate(given))


class Playing(Attempt):
    """An attempt that plays a program."""

    def __init__(
        self,
        store: DirectoryStore,
        number: int,
        spec: RunSpec,
        scratch: Path,
        process: TrainingProcess | None,
        stall_timeout_s: float | None,
    ) -> None:
        self.log = run_log(store, RUN)
        self.log.append(claimed(number))
        process = process or TrainingProcess(PLAYER)
        self.root = scratch / f"{RUN}-a{number}-{incarnation(number)}"
        supervisor = Supervisor(
            store,
            Assignment(run_id=RUN, attempt=number, incarnation=incarnation(number)),
            spec,
            Options(
                checkpoint=CheckpointPolicy(every_steps=4, every_s=None),
                threads=1,
                stall_timeout_s=stall_timeout_s,
            ),
            scratch=scratch,
            ledger=self.log,
            process=process,
        )
        super().__init__(supervisor, process)

    @property
    def state(self) -> RunState:
        return self.log.refresh()

    def out(self, name: str) -> Path:
        return self.root / "out" / name


Begin = Callable[..., Playing]


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store")


@pytest.fixture
def begin(store: DirectoryStore, tmp_path: Path) -> Iterator[Begin]:
    """Begin attempts, and check that they leave neither files nor processes."""
    begun: list[Playing] = []

    def attempt(
        number: int,
        spec: RunSpec,
        process: TrainingProcess | None = None,
        stall_timeout_s: float | None = None,
    ) -> Playing:
        scratch = tmp_path / f"node-{number}"  # each on a disk of its own, as on another node
        begun.append(Playing(store, number, spec, scratch, process, stall_timeout_s))
        return begun[-1]

    yield attempt
    for one in begun:
        one.supervisor.stop(0.0)
        one.end()
        assert one.process.exit_code is not None
        assert list(one.root.parent.glob("*")) == [], "something was left on the disk"


def fetched(store: DirectoryStore, target: Path) -> dict[str, bytes]:
    """The newest checkpoint in the store, by name."""
    log = run_log(store, RUN)
    _, path = CheckpointStore(store, RUN, log).fetch_newest(log.refresh(), target)
    assert path is not None
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and file.name != "manifest.json"
    }


def test_its_folders_are_committed_as_they_are_and_its_result_ends_the_run(
    begin: Begin, store: DirectoryStore, tmp_path: Path
) -> None:
    gate = tmp_path / "go"
    attempt = begin(1, light("steps", gate=gate))
    wait_until(lambda: attempt.state.committed_step == 2, "its first checkpoint is committed")
    there = fetched(store, tmp_path / "at-2")
    assert json.loads(there["checkpoint-2/steps.json"]) == [1, 2]
    assert there["checkpoint-2/optimizer.bin"].startswith(b"not to be opened")
    gate.touch()
    progress = attempt.end()
    assert (progress.exit_code, progress.step, progress.error) == (EXIT_COMPLETE, 6, "")
    result = attempt.state.result
    assert result is not None
    assert result.step == 6
    assert result.metrics == {"error": 0.25}, "of the line of JSON behind a progress bar"
    assert fetched(store, tmp_path / "at-end") == {"lora.safetensors": b"[1, 2, 3, 4, 5, 6]"}


def test_killed_it_begins_elsewhere_with_its_folder_in_place(begin: Begin, tmp_path: Path) -> None:
    gate = tmp_path / "go"
    spec = light("steps", gate=gate)
    first = begin(1, spec)
    wait_until(lambda: first.state.committed_step == 2, "its first checkpoint is committed")
    os.kill(first.process.pid, signal.SIGKILL)
    assert first.end().exit_code == -signal.SIGKILL
    first.log.append(ended(1))
    gate.touch()
    second = begin(2, spec)
    progress = second.end()
    assert (progress.exit_code, progress.resumed_from, progress.step) == (EXIT_COMPLETE, 2, 6)
    assert second.state.result is not None


def test_a_folder_that_is_still_being_written_is_never_pushed(begin: Begin, tmp_path: Path) -> None:
    gate = tmp_path / "go"
    attempt = begin(1, light("slow", steps=5, gate=gate))
    wait_until(lambda: attempt.state.committed_step == 2, "its first checkpoint is committed")
    gate.touch()
    assert attempt.end().exit_code == EXIT_COMPLETE
    *saved, _ = attempt.state.stored
    assert [committed.step for committed in saved] in ([2], [2, 4])
    for committed in saved:
        sizes = {file.name: file.size_bytes for file in committed.files}
        whole = len(json.dumps(list(range(1, committed.step + 1))))
        assert sizes[f"checkpoint-{committed.step}/steps.json"] == whole
        assert f"checkpoint-{committed.step}/last.pkl" in sizes


def test_what_it_wrote_half_when_it_was_killed_is_never_pushed(begin: Begin, tmp_path: Path) -> None:
    gate = tmp_path / "go"
    first = begin(1, light("halfway", gate=gate))
    wait_until(lambda: first.state.committed_step == 2, "its first checkpoint is committed")
    gate.touch()
    progress = first.end()
    assert (progress.exit_code, first.state.committed_step) == (-signal.SIGKILL, 2)
    first.log.append(ended(1))
    second = begin(2, light("steps", gate=gate))
    assert second.end().exit_code == EXIT_COMPLETE


@pytest.mark.parametrize("launched", [False, True], ids=["itself", "behind a launcher that dies at once"])
def test_asked_to_stop_it_saves_itself_and_that_is_taken(
    begin: Begin, launched: bool, tmp_path: Path
) -> None:
    attempt = begin(1, polite(tmp_path, launched))
    wait_until(lambda: attempt.supervisor.progress.step >= 2, "it is at work")
    attempt.supervisor.stop(30.0)
    progress = attempt.end()
    assert progress.exit_code == EXIT_PREEMPTED
    assert attempt.state.committed_step == progress.step >= 3, "what it saved when it was asked"


def polite(tmp_path: Path, launched: bool) -> RunSpec:
    spec = light("polite", steps=100, gate=tmp_path / "never")
    assert spec.command is not None
    if not launched:
        return spec
    line = " ".join((sys.executable, *spec.command.words[1:]))
    return light("polite", steps=100, words=["bash", "-c", f"{line}; true"])


@pytest.mark.parametrize("mode", ["steps", "deaf"])
def test_what_saves_nothing_when_it_is_asked_to_stop_is_preempted_all_the_same(
    begin: Begin, mode: str, tmp_path: Path
) -> None:
    attempt = begin(1, light(mode, gate=tmp_path / "never"))
    wait_until(lambda: attempt.state.committed_step == 2, "its first checkpoint is committed")
    attempt.supervisor.stop(6.0)
    progress = attempt.end()
    assert (progress.exit_code, attempt.state.committed_step) == (EXIT_PREEMPTED, 2)


@pytest.mark.parametrize(
    ("mode", "code", "said"),
    [
        ("fails", 1, "RuntimeError: CUDA out of memory"),
        ("nothing", EXIT_BAD_CONFIG, "nothing matches command.result 'lora.safetensors'"),
        ("far", EXIT_BAD_CONFIG, "checkpoint-1002 is beyond command.steps, 6"),
    ],
)
def test_its_end_says_whose_fault_it_was(
    begin: Begin, mode: str, code: int, said: str, tmp_path: Path
) -> None:
    gate = tmp_path / "never" if mode == "far" else None
    attempt = begin(1, light(mode, gate=gate))
    progress = attempt.end()
    assert progress.exit_code == code
    assert said in progress.error
    if mode == "fails":
        assert attributed(code, progress.evidence, progress.error) == "OOM_GPU"
    assert attempt.state.result is None


WARM = """
import os
from trainer import process
process._import_everything = lambda: None  # it takes long, and is not what this is about
os._exit(process.main())
"""


def test_one_that_hangs_is_killed_and_says_where_it_was(begin: Begin, tmp_path: Path) -> None:
    attempt = begin(1, light("steps", gate=tmp_path / "never"), stall_timeout_s=3.0)
    progress = attempt.end()
    assert progress.exit_code is not None
    assert attributed(progress.exit_code, progress.evidence, progress.error) == "STALLED"
    assert re.search(r"it was at foreign_script.py:\d+ in main", progress.error), progress.error


def test_a_warm_training_process_becomes_the_command_and_dies_with_its_supervisor_all_the_same(
    begin: Begin, tmp_path: Path
) -> None:
    attempt = begin(1, light("steps", gate=tmp_path / "never"), TrainingProcess((sys.executable, "-c", WARM)))
    wait_until(lambda: attempt.state.committed_step == 2, "its first checkpoint is committed")
    (program,) = psutil.Process(attempt.process.pid).children()
    assert "trainer.command" in psutil.Process(attempt.process.pid).cmdline()
    assert attempt.process._process.stdin is not None
    attempt.process._process.stdin.close()  # as when the supervisor dies
    assert attempt.end().exit_code == -signal.SIGKILL
    wait_until(lambda: is_gone(program), "the program is gone too")


def is_gone(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


HELD = """
import itertools, runpy, sys, time
steps, sleep, held_at = itertools.count(1), time.sleep, int(sys.argv[1])
time.sleep = lambda _: sleep(600) if next(steps) >= held_at else None
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script that sleeps after each step, up to a step."""


def test_a_script_with_accelerate_killed_at_random_ends_as_if_it_had_not_been(
    begin: Begin, store: DirectoryStore, tmp_path: Path
) -> None:
    name, steps, data = "pytorch_lora_weights.safetensors", 24, EXAMPLE / "data"

    def words(out: Path | str, every: int | str) -> list[str]:
        given = [f"--train_data_dir={data}", f"--output_dir={out}", f"--max_train_steps={steps}"]
        return [str(EXAMPLE / "train.py"), *given, f"--checkpointing_steps={every}"]

    def spec(*before: str) -> RunSpec:
        resuming = [
            *words("{out}", "{every}"),
            "--checkpoints_total_limit=2",
            "--resume_from_checkpoint=latest",
        ]
        marker = "random_states_*.pkl"
        return light("", steps, words=["python", *before, *resuming], complete=marker, result=[name])

    (tmp_path / "straight").mkdir()
    straight = [sys.executable, *words(tmp_path / "straight", steps)]
    uninterrupted = subprocess.Popen(straight, stderr=subprocess.DEVNULL)
    held_at = random.randint(5, steps - 1)
    first = begin(1, spec("-c", HELD, str(held_at)))
    wait_until(lambda: first.supervisor.progress.step >= held_at, f"step {held_at}")
    wait_until(lambda: first.state.committed_step >= 4, "a checkpoint is committed")
    os.kill(first.process.pid, signal.SIGKILL)
    first.end()
    first.log.append(ended(1))
    progress = begin(2, spec()).end()
    assert (progress.exit_code, progress.step, progress.error) == (EXIT_COMPLETE, steps, "")
    assert progress.resumed_from >= 4
    assert uninterrupted.wait(DEADLINE_S) == 0
    assert fetched(store, tmp_path / "end")[name] == (tmp_path / "straight" / name).read_bytes()
