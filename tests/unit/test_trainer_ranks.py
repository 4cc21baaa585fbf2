"""One run by several processes: real ones, on this machine's CPU, through gloo."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from support.tiny_world import tiny_spec
from support.training import Lay, StopAtStep, contents, events, newest

from storage.local import step_dir
from trainer.attempt import run_attempt
from trainer.rundir import EXIT_COMPLETE, EXIT_PREEMPTED, RunDir
from trainer.stop import Stop
from trainer.tensor_file import read
from trainer.training_process import TrainingProcess

DEADLINE_S = 280.0
"""For what happens if all is well, on a machine as slow as it may be."""

Start = Callable[[RunDir], TrainingProcess]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[TrainingProcess] = []

    def make(run_dir: RunDir) -> TrainingProcess:
        started.append(TrainingProcess(extra={"OMP_NUM_THREADS": "1"}))
        started[-1].begin(run_dir.root)
        return started[-1]

    yield make
    for process in started:
        process.kill()


def until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.02)


def end_of(process: TrainingProcess) -> int:
    until(lambda: process.exit_code is not None, "it ended")
    assert process.exit_code is not None
    return process.exit_code


def others(pid: int) -> list[psutil.Process]:
    """The processes that train beside the first."""
    return [p for p in psutil.Process(pid).children() if "trainer.process" in words_of(p)]


def words_of(process: psutil.Process) -> list[str]:
    """What it was started with; nothing of one that has ended and is only not waited for yet."""
    try:
        return process.cmdline()
    except (psutil.ZombieProcess, psutil.NoSuchProcess):
        return []


def adapter(run_dir: RunDir) -> dict[str, torch.Tensor]:
    return read(newest(run_dir) / "adapter.safetensors")[0]


def at_step(run_dir: RunDir, step: int) -> bool:
    return any(event["step"] >= step for event in events(run_dir, "step"))


def test_two_processes_give_the_same_bytes_after_a_stop_and_one_goes_on_with_the_same_samples(
    world: Path, lay: Lay
) -> None:
    """This very process is the first of two."""
    spec = tiny_spec(world / "base", world / "images", base={"lora_dropout": 0.0, "ema_decay": 0.9})
    straight = lay("straight", spec, processes=2, every_steps=3)
    assert run_attempt(straight, Stop()) == EXIT_COMPLETE
    middle = straight.checkpoints / step_dir(3)
    second = lay("second", spec, resume=middle, processes=2)
    assert run_attempt(second, StopAtStep(second, 6)) == EXIT_PREEMPTED
    assert others(os.getpid()) == []
    alone = lay("alone", spec, resume=middle)
    assert run_attempt(alone, Stop()) == EXIT_COMPLETE

    ends = [contents(newest(run_dir)) for run_dir in (second, straight)]
    assert ends[0]["adapter.safetensors"] == ends[1]["adapter.safetensors"]
    seen, again, by_one = (
        [(event["step"], event["first_sample"], event["loss"]) for event in events(run_dir, "step")]
        for run_dir in (straight, second, alone)
    )
    assert again == seen[3:]
    assert by_one == [(step, sample, pytest.approx(loss, rel=1e-4)) for step, sample, loss in seen[3:]]
    torch.testing.assert_close(adapter(alone), adapter(straight), rtol=1e-3, atol=1e-6)


def test_the_end_of_one_is_the_end_of_all(world: Path, lay: Lay, start: Start) -> None:
    run_dir = lay(
        "run", tiny_spec(world / "base", world / "images", base={"max_train_steps": 10**6}), processes=2
    )
    process = start(run_dir)
    until(lambda: process.exit_code is not None or at_step(run_dir, 2), "two steps were taken")
    assert process.exit_code is None, run_dir.log.read_text()
    (other,) = others(process.pid)

    other.send_signal(signal.SIGKILL)

    assert end_of(process) == -signal.SIGKILL
    assert events(run_dir, "error")[-1]["message"] == (
        "process 2 of the 2 that train together was killed by SIGKILL"
    )
