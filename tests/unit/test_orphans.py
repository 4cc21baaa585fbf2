"""Nothing trains on for nobody: not without its supervisor, and not for an attempt that is over."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from support import light_trainer
from support.runs import RUN, claimed, ended, finished, incarnation
from support.waiting import DEADLINE_S, wait_until

from storage.errors import Fenced, Unavailable
from storage.log import run_log
from storage.memory import MemoryStore
from storage.run_state import RunState
from trainer import claim_watch
from trainer.claim_watch import ClaimWatch
from trainer.config import Base, Dataset, RunSpec
from trainer.rundir import CheckpointPolicy, Options
from trainer.supervisor import Assignment, Supervisor
from trainer.training_process import TrainingProcess

TRAINER = """
import ctypes, subprocess, sys
sys.stdin.readline()
from trainer.orphan import die_with_stdin
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
die_with_stdin()
print(child.pid, flush=True)
{then}
"""
HANGS_IN_A_LIBRARY = "ctypes.PyDLL(None).sleep(600)  # holds the interpreter's lock"
SLEEPS = "import time; time.sleep(600)"

SUPERVISOR = """
import sys, time
from pathlib import Path
from trainer.training_process import TrainingProcess
process = TrainingProcess([sys.executable, "-c", sys.argv[1]])
process.begin(Path.cwd())
print(process.pid, flush=True)
time.sleep(600)
"""


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


RAYLET = """
import subprocess, sys, time
agent = subprocess.Popen([sys.executable, "-c", *sys.argv[1:]])
print(agent.pid, flush=True)
time.sleep(600)
"""
AGENT = """
import os, threading
from orchestrator.on_ray.lineage import end_with_parent
threading.Thread(target=end_with_parent, args=(os.getppid(),)).start()
"""


def test_an_agent_whose_raylet_is_killed_ends_by_itself_with_its_trainers() -> None:
    command = [sys.executable, "-c", RAYLET, AGENT + SUPERVISOR, TRAINER.format(then=SLEEPS)]
    raylet = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    assert raylet.stdout is not None
    with raylet:
        pids = [int(raylet.stdout.readline()) for _ in range(3)]
        assert not any(map(gone, pids))

        raylet.kill()

        for pid in pids:
            wait_until(lambda pid=pid: gone(pid), f"{pid} is gone")  # type: ignore[misc]


@pytest.mark.parametrize(
    ("then", "frozen"),
    [
        (SLEEPS, False),
        pytest.param(
            HANGS_IN_A_LIBRARY,
            False,
            marks=pytest.mark.skipif(sys.platform != "linux", reason="Linux's kernel"),
        ),
        pytest.param(
            SLEEPS, True, marks=pytest.mark.skipif(sys.platform != "linux", reason="Linux's kernel")
        ),
    ],
    ids=["trains", "hangs in a library", "is stopped"],
)
def test_a_trainer_whose_supervisor_is_killed_ends_by_itself_with_its_children(
    then: str, frozen: bool
) -> None:
    command = [sys.executable, "-c", SUPERVISOR, TRAINER.format(then=then)]
    supervisor = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    assert supervisor.stdout is not None
    with supervisor:
        pids = [int(supervisor.stdout.readline()) for _ in range(2)]
        assert not any(map(gone, pids))
        if frozen:
            os.kill(max(pids, key=lambda pid: psutil.Process(pid).ppid() == supervisor.pid), signal.SIGSTOP)

        supervisor.kill()

        for pid in pids:
            wait_until(lambda pid=pid: gone(pid), f"{pid} is gone")  # type: ignore[misc]


ASKS = """
from orchestrator.notices.own import Command
Command(["sh", "-c", "sleep 600 & echo $$ > command; echo $! > child; wait"]).poll()
"""


def test_a_command_that_hangs_ends_with_the_agent_that_asked_it(tmp_path: Path) -> None:
    agent = subprocess.Popen([sys.executable, "-c", ASKS], cwd=tmp_path)
    files = [tmp_path / "command", tmp_path / "child"]
    wait_until(lambda: all(file.exists() and file.read_text().strip() for file in files), "it hangs")
    pids = [int(file.read_text()) for file in files]
    assert not any(map(gone, pids))

    agent.kill()
    agent.wait()

    for pid in pids:
        wait_until(lambda pid=pid: gone(pid), f"{pid} is gone")  # type: ignore[misc]


SCRATCH = """
import sys
from orchestrator.on_ray.scratch import own_scratch
print(own_scratch(), flush=True)
sys.stdin.read()
"""


def test_an_agents_folder_stays_while_it_lives_whatever_its_pid_and_is_removed_by_the_next(
    tmp_path: Path,
) -> None:
    """Containers on one disk see neither each other's processes nor different process ids."""

    def agent() -> tuple[subprocess.Popen[str], Path]:
        process = subprocess.Popen(
            [sys.executable, "-c", SCRATCH],
            env={**os.environ, "TMPDIR": str(tmp_path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        return process, Path(process.stdout.readline().strip())

    first, folder = agent()
    with first:
        (folder / "checkpoint").touch()
        foreign = folder.parent / "1"
        foreign.mkdir()
        elsewhere = folder.rename(folder.parent / "999999999")  # a pid that is nobody's here
        with agent()[0] as second:
            assert (elsewhere / "checkpoint").exists()
            second.kill()

        first.kill()
    with agent()[0] as third:
        left = set(folder.parent.iterdir())
        third.kill()

    assert elsewhere not in left
    assert foreign in left, "who left no lock is no agent"
    assert len(left) == 2, "the dead one's is removed, too"


SPARE = """
import sys, time
from trainer import process
def hang(): time.sleep(600)
process.{hangs} = hang
print("hangs", flush=True)
process.main()
"""


@pytest.mark.parametrize("hangs", ["_import_everything", "check_gpu"])
def test_a_spare_that_hangs_before_it_has_work_ends_with_whoever_holds_it(hangs: str) -> None:
    command = [sys.executable, "-c", SPARE.format(hangs=hangs)]
    if hangs == "check_gpu":
        command[-1] = command[-1].replace(
            "process.main()", "process._import_everything = lambda: 0; process.main()"
        )
    spare = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert spare.stdin is not None
    assert spare.stdout is not None
    with spare:
        assert spare.stdout.readline() == b"hangs\n"
        spare.stdin.write(b"a part of a line")
        spare.stdin.flush()
        spare.stdin.close()
        try:
            assert spare.wait(DEADLINE_S) == -signal.SIGKILL
        finally:
            spare.kill()


class Heard:
    """A ledger that counts how often it is read, and may not answer; and what the watch said."""

    def __init__(self, store: MemoryStore) -> None:
        self._log = run_log(store, RUN)
        self.reads = 0
        self.away = False
        self.said: list[Fenced] = []

    def refresh(self) -> RunState:
        self.reads += 1
        if self.away:
            raise Unavailable("away")
        return self._log.refresh()

    def append(self, record: object) -> RunState:
        raise AssertionError


@pytest.mark.parametrize("over", ["a newer claim", "the run is over"])
def test_a_superseded_attempt_learns_of_it_without_a_commit_also_after_the_store_was_away(over: str) -> None:
    store = MemoryStore()
    log = run_log(store, RUN)
    log.append(claimed(1))
    heard = Heard(store)
    watch = ClaimWatch(heard, RUN, 1, incarnation(1), heard.said.append, every_s=0.005)
    watch.start()
    wait_until(lambda: heard.reads > 3, "it has looked")
    assert heard.said == []
    heard.away = True
    before = heard.reads
    wait_until(lambda: heard.reads > before + 2, "it has looked in vain")

    if over == "a newer claim":
        log.append(ended(1))
        log.append(claimed(2))
    else:
        log.append(finished())
    heard.away = False

    wait_until(lambda: bool(heard.said), "it is told")
    assert [str(error) for error in heard.said] == [f"{RUN}: attempt 1 is over, or was never claimed"]


def test_an_attempt_that_never_commits_again_ends_once_it_is_superseded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim_watch, "LOOK_S", 0.05)
    store = MemoryStore()
    log = run_log(store, RUN)
    log.append(claimed(1))
    process = TrainingProcess((sys.executable, light_trainer.__file__, "deaf"))
    supervisor = Supervisor(
        store,
        Assignment(run_id=RUN, attempt=1, incarnation=incarnation(1)),
        RunSpec(base=Base(model="owner/model"), dataset=Dataset(path="/data")),
        Options(checkpoint=CheckpointPolicy(every_steps=1, every_s=None), threads=1),
        scratch=tmp_path,
        ledger=run_log(store, RUN),
        process=process,
    )
    thread = threading.Thread(target=supervisor.run)
    thread.start()
    try:
        wait_until(lambda: log.refresh().committed_step == 1, "its only step is committed")
        log.append(ended(1))
        log.append(claimed(2))
    finally:
        thread.join(DEADLINE_S)
        supervisor.stop(0.0)
        thread.join(DEADLINE_S)

    assert (supervisor.progress.exit_code, supervisor.progress.superseded) == (-signal.SIGKILL, True)
    assert gone(process.pid)
