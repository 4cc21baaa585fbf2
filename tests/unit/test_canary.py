"""Whether a node can train is found out before it gets a run, and asked again."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from support.fake_cluster import FakeCluster, run_to_end, small_sweep
from support.waiting import wait_until

from orchestrator.control.cluster import StoreSpeed
from orchestrator.control.controller import Controller
from orchestrator.control.placing import Standing
from orchestrator.on_ray.canary import (
    LEAST_FREE_BYTES,
    LEAST_FREE_MEMORY_BYTES,
    LONGEST_UPLOAD_S,
    LOOKING,
    PROBE_BYTES,
    Canary,
    Sight,
    look,
    unfit,
)
from orchestrator.on_ray.spare import VERDICT_S, WarmSpare
from storage import layout
from storage.errors import AccessDenied, Unavailable
from storage.garbage.inventory import sort_out
from storage.log import run_log
from storage.memory import MemoryStore
from storage.object_store import ObjectInfo
from storage.records import EndReason
from storage.run_state import FREE_ENDS
from trainer.evidence import Evidence, attributed
from trainer.gpu_check import gpu_problem
from trainer.memory.host import free_bytes
from trainer.rundir import EXIT_UNFIT, GPU_CHECK, GPU_WORKS
from trainer.training_process import STUCK, TrainingProcess


@pytest.mark.parametrize(
    ("sight", "checkpoint_bytes", "said"),
    [
        (Sight(), 0, ""),
        (Sight(disk_free_bytes=LEAST_FREE_BYTES), 0, ""),
        (Sight(disk_free_bytes=LEAST_FREE_BYTES - 1), 0, "room for 0.10 GB"),
        (Sight(disk_free_bytes=10**9), 6 * 10**8, "2 checkpoints take 1.20"),
        (Sight(problem="it cannot use the store"), 0, "it cannot use the store"),
        (Sight(clock_ahead_s=3.0), 0, ""),
        (Sight(memory_free_bytes=LEAST_FREE_MEMORY_BYTES), 0, ""),
        (Sight(memory_free_bytes=LEAST_FREE_MEMORY_BYTES - 1), 0, "its memory has room for 0.50 GB"),
        (Sight(speed=StoreSpeed(up=1.0, down=1.0)), 0, ""),
        (Sight(speed=StoreSpeed(up=1e6, down=1.0)), int(1e6 * LONGEST_UPLOAD_S), ""),
        (Sight(speed=StoreSpeed(up=1e6, down=1e9)), 6 * 10**9, "6000 MB would take 100 min to the store"),
        (Sight(clock_ahead_s=-7200.0, problem="AccessDenied"), 0, "clock is 7200 s behind"),
    ],
)
def test_what_makes_a_node_unfit(sight: Sight, checkpoint_bytes: int, said: str) -> None:
    found = unfit(sight, checkpoint_bytes)

    assert said in found
    assert bool(found) == bool(said)


class _Away(MemoryStore):
    def head(self, key: str) -> ObjectInfo | None:
        raise Unavailable("no route to host")


def test_a_node_is_looked_at_as_it_is(tmp_path: Path) -> None:
    store = MemoryStore()
    assert "sees no sweep cat in memory://" in look(store, "cat", tmp_path).problem

    store.put(layout.sweep_spec("cat"), b"{}")
    assert look(store, "cat", tmp_path).problem == ""
    assert (look(store, "cat", tmp_path).disk_free_bytes or 0) > 0
    assert look(None, "cat", tmp_path).problem == "", "an agent without keys asks nobody"
    assert look(_Away(), "cat", tmp_path).problem == (
        "it cannot use the store: Unavailable: no route to host"
    )
    assert "disk cannot be used" in look(store, "cat", tmp_path / "gone").problem
    assert 0 < (look(store, "cat", tmp_path).memory_free_bytes or 0) < psutil.virtual_memory().total


class _Probed(MemoryStore):
    """Remembers what was put under keys of no run; ``broken`` says what becomes of that."""

    def __init__(self, broken: str = "") -> None:
        super().__init__()
        self.broken = broken
        self.probes: dict[str, int] = {}
        self.put(layout.sweep_spec("cat"), b"{}")

    def put(self, key: str, body: bytes | Path) -> None:
        if key.startswith("probe/"):
            assert isinstance(body, bytes)
            self.probes[key] = len(body)
            if self.broken == "denied":
                raise AccessDenied("s3:PutObject is not allowed here")
            if self.broken == "damaged":
                body = body[:-1]
        super().put(key, body)

    def get(self, key: str) -> bytes:
        if self.broken == "lost" and key.startswith("probe/"):
            raise Unavailable("the connection was reset")
        return super().get(key)


def test_the_way_to_the_store_is_tried_and_nothing_stays_there(tmp_path: Path) -> None:
    store = _Probed()
    speed = look(store, "cat", tmp_path).speed

    assert speed is not None
    assert speed.up > 0
    assert speed.down > 0
    assert list(store.probes.values()) == [PROBE_BYTES]
    assert [info.key for info in store.list("")] == [layout.sweep_spec("cat")]
    assert look(None, "cat", tmp_path).speed is None

    left = [ObjectInfo(key, size) for key, size in store.probes.items()]
    assert sort_out(left).probes == left, "what a process leaves that dies meanwhile is known to gc"


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        ("denied", ""),
        ("damaged", "read back other bytes than were written"),
        ("lost", "it cannot use the store: Unavailable: the connection was reset"),
    ],
)
def test_a_store_that_cannot_be_tried_out_is_bad_only_if_it_fails(
    broken: str, problem: str, tmp_path: Path
) -> None:
    store = _Probed(broken)
    sight = look(store, "cat", tmp_path)

    assert sight.speed is None
    assert problem in sight.problem
    assert bool(problem) == bool(sight.problem)
    assert list(store.list("probe/")) == []


@pytest.mark.parametrize(
    ("limit", "used", "droppable"),
    [
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_memory_is_what_the_tightest_control_group_leaves(
    limit: str, used: str, droppable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pod = tmp_path / "cgroup" / "pod"
    container = pod / "container"
    container.mkdir(parents=True)
    for group, numbers in ((pod, (900, 500)), (container, (1000, 300))):
        for name, number in zip((limit, used), numbers, strict=True):
            (group / name).write_text(f"{number}\n")
        (group / "memory.stat").write_text(f"anon 7\n{droppable} 50\n")
    monkeypatch.setattr("trainer.memory.host._CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr("trainer.memory.host._groups_of", lambda pid: [container])
    assert free_bytes(os.getpid()) == 900 - 500 + 50

    (pod / limit).write_text("max\n")
    assert free_bytes(os.getpid()) == 1000 - 300 + 50
    (container / limit).write_text("200\n")
    assert free_bytes(os.getpid()) == 0


def test_a_problem_is_told_and_asked_about_until_it_is_gone() -> None:
    answers = ["no room", "no room", ""]
    told: list[str] = []
    canary = Canary(
        lambda: answers.pop(0) if answers else "", lambda: told.append(canary.problem), pause_s=0.01
    )
    canary.start()
    wait_until(lambda: "" in told, "the problem is gone")
    assert told == ["no room", ""]

    answers.append("full")
    canary.again()
    wait_until(lambda: told[-2:] == ["full", ""], "it was asked again")


def test_a_check_that_breaks_says_nothing_about_the_node() -> None:
    asked: list[int] = []

    def ask() -> str:
        asked.append(1)
        raise RuntimeError("a bug")

    canary = Canary(ask, lambda: None, pause_s=0.01)
    assert canary.problem == LOOKING
    canary.start()
    wait_until(lambda: canary.problem == "", "it was asked")

    assert asked


# The warm spare.

LISTENS = "import sys; sys.stdin.readline()"
VERDICT = f"import os; open(os.environ['{GPU_CHECK}'], 'w').write('{{}}'); "
Spare = Callable[..., WarmSpare]


@pytest.fixture
def spare(tmp_path: Path) -> Iterator[Spare]:
    processes: list[TrainingProcess] = []

    def make(*programs: str, check_gpu: bool = True) -> WarmSpare:
        waiting = list(programs)

        def start(extra: dict[str, str]) -> TrainingProcess:
            processes.append(TrainingProcess((sys.executable, "-c", waiting.pop(0)), extra))
            return processes[-1]

        warm = WarmSpare(tmp_path, check_gpu=check_gpu, make=start, pause_s=10.0)
        warm.renew()
        return warm

    yield make
    for process in processes:
        process.kill()


def tended(warm: WarmSpare, now: float) -> str:
    warm.tend(now)
    return warm.problem


def test_a_gpu_that_does_not_work_is_tried_again_later(spare: Spare) -> None:
    broken = VERDICT.format("no GPU") + f"os._exit({EXIT_UNFIT})"
    warm = spare(broken, VERDICT.format(GPU_WORKS) + LISTENS)
    wait_until(lambda: tended(warm, 0.0) == "no GPU" and warm.take() is None, "it is known to be broken")

    wait_until(lambda: (tended(warm, 5.0), warm.take())[1] is None, "nothing happens before its time")
    warm.tend(5.0)
    warm.tend(100.0)
    wait_until(lambda: tended(warm, 100.0) == "", "it works again")
    assert warm.take() is not None


@pytest.mark.parametrize("end", [f"os._exit({EXIT_UNFIT})", "os._exit(1)", "os.kill(os.getpid(), 11)", "0"])
def test_a_process_that_dies_without_a_verdict_leaves_its_gpu_unfit_until_one_gives_it(
    spare: Spare, end: str
) -> None:
    warm = spare(f"import os; {end}", VERDICT.format(GPU_WORKS) + LISTENS)
    assert warm.problem == LOOKING

    wait_until(lambda: "its GPU could not be tried" in tended(warm, 0.0), "its end is seen")
    assert warm.take() is None
    warm.tend(5.0)
    warm.tend(100.0)
    wait_until(lambda: tended(warm, 100.0) == "", "it is tried again")
    assert warm.take() is not None


def test_a_process_that_hangs_in_the_check_is_ended_and_its_gpu_is_unfit(spare: Spare) -> None:
    warm = spare("import time; time.sleep(600)")
    assert tended(warm, 0.0) == tended(warm, VERDICT_S) == LOOKING

    assert "no answer in" in tended(warm, VERDICT_S + 1)
    assert warm.take() is None


def test_a_process_given_away_before_its_verdict_blames_the_node_if_it_dies_without_one(spare: Spare) -> None:
    warm = spare("import sys; sys.stdin.readline(); sys.exit(1)")
    process = warm.take()
    assert process is not None
    process.kill()

    assert process.exit_code is not None
    assert "its GPU could not be tried" in warm.ended(process.exit_code)


def test_a_slot_whose_process_cannot_be_killed_gets_nothing_until_that_is_gone(
    spare: Spare, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm = spare(LISTENS, LISTENS, check_gpu=False)
    process = warm.take()
    assert process is not None
    with monkeypatch.context() as patch:
        patch.setattr(TrainingProcess, "stuck", True)
        assert warm.ended(EXIT_UNFIT) == STUCK
        assert tended(warm, 0.0) == STUCK
        assert warm.take() is None

    process.kill()

    assert tended(warm, 1.0) == ""
    assert warm.take() is not None


def test_a_spare_that_has_died_is_replaced_when_it_is_taken(spare: Spare) -> None:
    warm = spare("", LISTENS, check_gpu=False)
    assert warm._process is not None
    wait_until(lambda: warm._process.exit_code == 0, "it has died")  # type: ignore[union-attr]

    process = warm.take()

    assert process is not None
    assert process.exit_code is None


def test_a_process_is_given_once_and_only_replaced_then(spare: Spare) -> None:
    warm = spare(LISTENS, LISTENS, check_gpu=False)
    warm.renew()
    first = warm.take()
    assert first is not None
    assert warm.take() is None

    warm.renew()

    second = warm.take()
    assert second is not None
    assert second.pid != first.pid


def test_the_real_check_says_what_this_machine_has(tmp_path: Path) -> None:
    verdict = tmp_path / "verdict"
    program = "from trainer.gpu_check import check_gpu; check_gpu(); print('goes on')"
    environment = {**os.environ, GPU_CHECK: str(verdict)}

    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)

    if torch.cuda.is_available():
        assert (ended.returncode, verdict.read_text(), ended.stdout) == (0, GPU_WORKS, "goes on\n")
    else:
        assert (ended.returncode, ended.stdout) == (EXIT_UNFIT, "")
        assert "torch sees no GPU" in verdict.read_text()


@pytest.mark.gpu
def test_a_gpu_that_works_has_no_problem() -> None:
    assert gpu_problem() == ""


def test_a_node_that_is_not_fit_costs_a_run_nothing() -> None:
    reason = attributed(EXIT_UNFIT, Evidence())

    assert reason is EndReason.NODE_UNFIT
    assert reason in FREE_ENDS


def test_the_controller_places_nothing_on_an_unfit_slot_until_it_is_fit() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=2)
    cluster = FakeCluster(store, sweep, nodes=2)
    cluster.unfit["n1/0"] = "its disk is full"
    controller = Controller(sweep, store, cluster, cluster.clock)

    for _ in range(3):
        controller.tick()
        cluster.advance()
    assert cluster.busy() == ["n2/0"]
    (barred,) = [note for note in controller.notes() if note.standing is Standing.BARRED]
    assert (barred.slot, barred.detail) == ("n1/0", "its disk is full")

    cluster.unfit.clear()
    controller.tick()
    cluster.advance()
    assert sorted(cluster.busy()) == ["n1/0", "n2/0"]
    for _ in run_to_end(controller, cluster):
        pass
    assert all(run_log(store, run.run_id).refresh().result for run in sweep.runs)
