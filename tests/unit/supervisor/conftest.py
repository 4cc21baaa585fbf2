"""Attempts at a run, which must leave neither files nor processes behind."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support import light_trainer
from support.attempts import Attempt
from support.runs import RUN, incarnation
from support.supervised import LIGHT_SPEC, Supervise

from storage.log import run_log
from storage.object_store import ObjectStore
from trainer.config import RunSpec
from trainer.rundir import CheckpointPolicy, Options
from trainer.supervisor import Assignment, Supervisor
from trainer.training_process import TrainingProcess

EVERY_STEP = CheckpointPolicy(every_steps=1, every_s=None)


def living_in_group(group: int) -> list[int]:
    """The processes of a group, without those that are dead and wait for somebody to ask."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


@pytest.fixture
def supervise(tmp_path: Path) -> Iterator[Supervise]:
    """Begin attempts, and check that they leave neither files nor processes."""
    begun: list[Attempt] = []
    scratch = tmp_path / "scratch"

    def begin(
        store: ObjectStore,
        attempt: int = 1,
        *,
        spec: RunSpec | None = None,
        cache: Path | None = None,
        light: str | None = None,
        process: TrainingProcess | None = None,
        who: str | None = None,
        stall_timeout_s: float | None = None,
    ) -> Attempt:
        if light:
            process = TrainingProcess((sys.executable, light_trainer.__file__, light))
        supervisor = Supervisor(
            store,
            Assignment(run_id=RUN, attempt=attempt, incarnation=who or incarnation(attempt)),
            spec or LIGHT_SPEC,
            Options(
                checkpoint=EVERY_STEP,
                threads=1,
                cache_dir=str(cache) if cache else None,
                stall_timeout_s=stall_timeout_s,
            ),
            scratch=scratch,
            ledger=run_log(store, RUN),
            process=process,
        )
        begun.append(Attempt(supervisor, process))
        return begun[-1]

    yield begin
    for attempt in begun:
        attempt.supervisor.stop(0.0)
        attempt.end()
        if attempt.process:
            assert attempt.process.exit_code is not None, "a process outlived its supervisor"
            assert living_in_group(attempt.process.pid) == [], "its children outlived it"
    assert list(scratch.glob("*")) == [], "something was left on the disk"
