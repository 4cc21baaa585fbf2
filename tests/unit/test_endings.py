"""Why an attempt ended, found out from real processes that raise, hang, are killed or take all memory."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import psutil
import pytest
import torch
from support import failing_trainer
from support.runs import claimed, incarnation
from support.training import events
from support.waiting import wait_until

from orchestrator.control.blame import advised
from storage import layout
from storage.log import run_log
from storage.memory import MemoryStore
from storage.object_store import ObjectInfo
from storage.records import EndReason
from trainer import process as training
from trainer.config import Base, Dataset, RunSpec
from trainer.errors import Diverged
from trainer.evidence import ADVICE, Evidence, attributed, told
from trainer.hang import where
from trainer.memory.host import MemoryWatch
from trainer.rundir import Options, RunDir
from trainer.stop import Stop
from trainer.supervisor import Assignment, Progress, Supervisor
from trainer.training_process import TrainingProcess

RUN = "cat-r16"
TIMEOUT_S = 1.0
SPEC = RunSpec(base=Base(model="owner/model"), dataset=Dataset(path="/data"))

Start = Callable[[str], TrainingProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[TrainingProcess] = []

    def make(mode: str) -> TrainingProcess:
        ready = tmp_path / f"ready-{len(started)}"
        command = (sys.executable, "-m", "support.failing_trainer", str(ready), mode)
        started.append(TrainingProcess(command))
        wait_until(ready.exists, "the process listens")
        return started[-1]

    folders = f"{Path(failing_trainer.__file__).parent.parent}{os.pathsep}{os.getcwd()}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", folders)
        yield make
    for process in started:
        process.kill()


def supervised(
    process: TrainingProcess, store: MemoryStore, scratch: Path, timeout_s: float | None = TIMEOUT_S
) -> Progress:
    run_log(store, RUN).append(claimed(1))
    return Supervisor(
        store,
        Assignment(run_id=RUN, attempt=1, incarnation=incarnation(1)),
        SPEC,
        Options(stall_timeout_s=timeout_s),
        scratch=scratch,
        ledger=run_log(store, RUN),
        process=process,
    ).run()


def reason(final: Progress) -> EndReason:
    assert final.exit_code is not None
    return attributed(final.exit_code, final.evidence, final.error)


def test_a_process_that_hangs_is_caught_and_its_stacks_are_shipped(start: Start, tmp_path: Path) -> None:
    store = MemoryStore()

    final = supervised(start("hang"), store, tmp_path)

    assert reason(final) is EndReason.STALLED
    assert (final.exit_code, final.step) == (-signal.SIGKILL, 1)
    assert final.evidence.hung_s >= TIMEOUT_S
    assert "nothing happened for" in final.error
    assert "threading.py" in final.error, "the innermost line of the main thread"
    shipped = b"".join(store.get(info.key) for info in store.list(layout.logs_prefix(RUN))).decode()
    assert "in wait_for_what_never_comes" in shipped
    assert where(shipped) in final.error
    assert run_log(store, RUN).refresh().committed_step == 1, "what it had saved is pushed"


def test_a_process_that_is_frozen_has_no_stacks_to_tell_and_ends_all_the_same(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.vigil.DUMP_S", 0.1)
    process = start("hang")
    os.kill(process.pid, signal.SIGSTOP)

    final = supervised(process, MemoryStore(), tmp_path)

    assert reason(final) is EndReason.STALLED
    assert final.error.startswith("nothing happened for")


@pytest.mark.parametrize("error", [AttributeError("io_counters"), FileNotFoundError("/proc/7/io")])
def test_a_system_that_does_not_count_what_a_process_reads_harms_no_run(
    error: Exception, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counters(process: psutil.Process) -> None:
        raise error

    monkeypatch.setattr(psutil.Process, "io_counters", counters)

    final = supervised(start("hang"), MemoryStore(), tmp_path)

    assert reason(final) is EndReason.STALLED, "it was watched all the same"


def test_a_process_that_somebody_kills_is_killed(start: Start, tmp_path: Path) -> None:
    process = start("hang")
    os.kill(process.pid, signal.SIGKILL)

    final = supervised(process, MemoryStore(), tmp_path)

    assert reason(final) is EndReason.KILLED


@pytest.fixture
def small_memory() -> Iterator[Path]:
    """A control group with 200 MB, as far as this machine lets us make one."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            parent = Path("/sys/fs/cgroup", controllers, path.lstrip("/"))
            limit = "memory.limit_in_bytes" if controllers else "memory.max"
            group = parent / f"orchestrate-test-{os.getpid()}"
            try:
                group.mkdir()
            except OSError:
                continue
            try:
                (group / limit).write_text("200000000")
            except OSError:
                group.rmdir()
                continue
            yield group
            wait_until(lambda group=group: not (group / "cgroup.procs").read_text(), "the group is empty")  # type: ignore[misc]
            group.rmdir()
            return
    pytest.skip("no memory control group can be made here: needs root and a writable /sys/fs/cgroup")


def test_a_process_that_takes_all_memory_was_too_large(
    start: Start, tmp_path: Path, small_memory: Path
) -> None:
    process = start("memory")
    (small_memory / "cgroup.procs").write_text(str(process.pid))

    final = supervised(process, MemoryStore(), tmp_path, timeout_s=None)

    assert reason(final) is EndReason.OOM_HOST
    assert final.evidence.memory_bytes == pytest.approx(200_000_000, rel=0.01)
    assert told(-9, final.evidence) == "the trainer was killed by the kernel: the memory of 0.2 GB was full"


def test_a_process_that_takes_all_memory_while_its_checkpoint_is_fetched_was_too_large(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = tmp_path / "group"
    group.mkdir()
    (group / "memory.max").write_text("1000000")
    (group / "memory.events").write_text("oom_kill 3\n")
    monkeypatch.setattr("trainer.memory.host._groups_of", lambda pid: [group])
    process = start("hang")

    class Fetching(MemoryStore):
        """The kernel kills while this is asked for what to resume from."""

        def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
            if any(tmp_path.glob(f"{RUN}-*")):
                (group / "memory.events").write_text("oom_kill 4\n")
                os.kill(process.pid, signal.SIGKILL)
            return super().list(prefix, after)

    final = supervised(process, Fetching(), tmp_path)

    assert reason(final) is EndReason.OOM_HOST
    assert final.evidence.memory_bytes == 1_000_000


def test_what_a_process_says_of_its_exception_decides(start: Start, tmp_path: Path) -> None:
    final = supervised(start("OutOfMemoryError:CUDA out of memory. Tried"), MemoryStore(), tmp_path)

    assert reason(final) is EndReason.OOM_GPU
    assert final.evidence.memory_bytes == 16_000_000
    assert told(1, final.evidence, final.error) == (
        "the trainer exited with code 1: OutOfMemoryError: CUDA out of memory. Tried"
    )


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), EndReason.OOM_GPU),
        (
            torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
            EndReason.CUDA_ERROR,
        ),
        (torch.AcceleratorError("CUDA error: out of memory"), EndReason.OOM_GPU),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), EndReason.CUDA_ERROR),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), EndReason.OOM_GPU),
        (MemoryError(), EndReason.OOM_HOST),
        (numpy._core._exceptions._ArrayMemoryError((1,), numpy.dtype("u1")), EndReason.OOM_HOST),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), EndReason.OOM_HOST),
        (Diverged("step 3: loss nan", ADVICE[EndReason.NAN_LOSS]), EndReason.NAN_LOSS),
        (ValueError("the user's own CUDA error"), EndReason.APP_ERROR),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), EndReason.APP_ERROR),
    ],
)
def test_the_real_exceptions_are_recognised_and_come_with_a_hint(
    error: Exception, expected: EndReason, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(run_dir: RunDir, stop: Stop) -> int:
        raise error

    monkeypatch.setattr("trainer.attempt.run_attempt", fail)
    run_dir = RunDir(tmp_path)
    run_dir.spec.write_text(SPEC.model_dump_json())

    code = training.serve(run_dir, Stop())

    (event,) = events(run_dir)
    said = f"{event['type']}: {event['message']}"
    assert attributed(code, Evidence(error_type=event["type"]), said) is expected
    assert event["hint"] == ADVICE.get(expected, "see log.txt")


def test_out_of_memory_says_what_is_left_to_do_in_order_of_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(run_dir: RunDir, stop: Stop) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("trainer.attempt.run_attempt", fail)
    base = {"model": "m", "gradient_checkpointing": True, "train_batch_size": 4, "rank": 64}
    spec = RunSpec.model_validate({"base": base, "dataset": {"path": "images"}})
    hints = []
    for name, options in (("run", Options()), ("split already", Options(micro_batch=1))):
        run_dir = RunDir(tmp_path / name)
        run_dir.root.mkdir()
        run_dir.spec.write_text(spec.model_dump_json())
        run_dir.options.write_text(options.model_dump_json())
        training.serve(run_dir, Stop())
        hints.append(events(run_dir)[0]["hint"])

    after = (
        "base.mixed_precision bf16, base.quantize fp8 (SDXL: nf4), base.resolution below 512, "
        "base.optimizer adamw8bit, base.rank below 64, or a larger GPU"
    )
    assert hints == [
        f"to need less memory, in order of effect: resources.micro_batch 1, {after}",
        f"to need less memory, in order of effect: {after}",
    ]
    assert advised(EndReason.OOM_GPU, f"the trainer exited: {hints[0]}") == f"the trainer exited: {hints[0]}"


def test_the_kernels_own_count_is_read_somewhere() -> None:
    watch = MemoryWatch(os.getpid())

    assert watch.seen(0.0).oom_kills == 0, "nobody was killed meanwhile"
