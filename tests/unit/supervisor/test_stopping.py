"""Attempts that are stopped, killed, or cannot be."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import light_trainer
from support.runs import RUN, ended
from support.supervised import Failing, Supervise, claim
from support.sweeps import state
from support.waiting import wait_until

from storage.errors import Fenced, Unavailable
from storage.log import run_log
from storage.memory import MemoryStore
from storage.records import EndReason
from trainer.rundir import EXIT_PREEMPTED, EXIT_UNFIT
from trainer.training_process import STUCK, TrainingProcess


def test_a_trainer_that_does_not_stop_in_time_is_killed_with_its_children(supervise: Supervise) -> None:
    store = MemoryStore()
    claim(store, 1)
    attempt = supervise(store, light="deaf")
    wait_until(lambda: state(store, RUN).committed_step == 1, "its step is committed")

    began = time.monotonic()
    attempt.supervisor.stop(grace_s=0.2)
    final = attempt.end()

    assert final.exit_code == -signal.SIGKILL
    assert time.monotonic() - began >= 0.2


def test_a_shorter_grace_replaces_a_longer_one_and_never_the_other_way(supervise: Supervise) -> None:
    store = MemoryStore()
    claim(store, 1)
    attempt = supervise(store, light="deaf")
    wait_until(lambda: state(store, RUN).committed_step == 1, "its step is committed")

    attempt.supervisor.stop(grace_s=600.0)
    attempt.supervisor.stop(grace_s=0.0)
    attempt.supervisor.stop(grace_s=600.0)

    assert attempt.end().exit_code == -signal.SIGKILL


def test_an_attempt_may_be_stopped_before_it_begins(supervise: Supervise) -> None:
    store = MemoryStore()
    claim(store, 1)
    attempt = supervise(store, light="forever")
    attempt.supervisor.stop(grace_s=60.0)

    assert attempt.end().exit_code == EXIT_PREEMPTED


def test_a_trainer_that_our_stop_ends_before_it_listens_was_preempted_and_not_killed(
    supervise: Supervise,
) -> None:
    store = MemoryStore()
    claim(store, 1)
    process = TrainingProcess((sys.executable, "-c", "import time; time.sleep(600)"))
    attempt = supervise(store, process=process)
    attempt.supervisor.stop(grace_s=60.0)

    assert attempt.end().exit_code == EXIT_PREEMPTED


def test_a_trainer_that_somebody_else_ends_was_killed(supervise: Supervise) -> None:
    store = MemoryStore()
    claim(store, 1)
    process = TrainingProcess((sys.executable, "-c", "import time; time.sleep(600)"))
    attempt = supervise(store, process=process)
    os.kill(process.pid, signal.SIGTERM)

    assert attempt.end().exit_code == -signal.SIGTERM


class InTheKernel:
    """Stands for a process that no signal reaches any more: it cannot be made without a broken driver."""

    def __init__(self, real: subprocess.Popen[bytes]) -> None:
        self.pid, self.stdin = real.pid, real.stdin

    def poll(self) -> None:
        return None

    def send_signal(self, number: int) -> None:
        pass

    def wait(self, timeout: float) -> None:
        raise subprocess.TimeoutExpired("trainer", timeout)


@pytest.mark.parametrize("end", ["it hangs", "a stop", "a newer claim"])
def test_a_trainer_that_cannot_be_killed_ends_the_attempt_with_what_it_saved_and_blames_the_node(
    end: str, supervise: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Failing("put", Unavailable("503 SlowDown"))
    claim(store, 1)
    process = TrainingProcess((sys.executable, light_trainer.__file__, "forever"))
    attempt = supervise(store, process=process, stall_timeout_s=1.0 if end == "it hangs" else None)
    wait_until(lambda: state(store, RUN).committed_step > 0, "something is committed")
    store.armed = True
    before = state(store, RUN).committed_step
    wait_until(lambda: attempt.supervisor.progress.step > before + 2, "more is saved")
    os.kill(process.pid, signal.SIGSTOP)
    real = process._process
    monkeypatch.setattr(os, "killpg", lambda group, number: setattr(store, "armed", False))
    process._process = InTheKernel(real)  # type: ignore[assignment]
    try:
        if end == "a stop":
            attempt.supervisor.stop(grace_s=0.0)
        elif end == "a newer claim":
            run_log(store, RUN).append(ended(1, EndReason.NODE_UNREACHABLE))
            attempt.supervisor._on_fenced(Fenced("attempt 1 is fenced"))
        final = attempt.end()
    finally:
        monkeypatch.undo()
        process._process = real
        real.kill()
        real.wait()
        process.kill()

    assert (final.exit_code, final.superseded) == (EXIT_UNFIT, end == "a newer claim")
    assert final.error.startswith(STUCK)
    assert ("nothing happened for" in final.error) == (end == "it hangs")
    if end != "a newer claim":
        assert state(store, RUN).committed_step >= final.step - 1 > before, "what it had saved is pushed"


def test_a_process_that_is_gone_can_be_given_work_stopped_and_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = TrainingProcess((sys.executable, "-c", "raise SystemExit(3)"))
    wait_until(lambda: process.exit_code == 3, "it has ended")

    process.begin(tmp_path)
    process.terminate()
    process.kill()
    with monkeypatch.context() as patch:
        patch.setattr(os, "killpg", lambda group, number: pytest.fail("its number may be another's now"))
        process.kill()

    assert process.exit_code == 3
