"""A node's disk that is full, out of inodes, read-only or silent: what was saved stays, nothing crash-loops.

Real file systems, mounted for each test: that takes root.
"""

import contextlib
import errno
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.runs import RUN, claimed, incarnation, write_checkpoint
from torch import nn

from storage import replicator as replicator_module
from storage.errors import Fenced
from storage.local import LocalCheckpoint, complete_checkpoints, verify
from storage.log import run_log
from storage.memory import MemoryStore
from storage.records import EndReason
from storage.replicator import Replicator, superfluous
from trainer import writing
from trainer.config import Base, Dataset, RunSpec
from trainer.errors import DiskFull
from trainer.rundir import EXIT_DISK_FULL, Options, RunDir, append_event, end_reason, read_events
from trainer.snapshot import Progress
from trainer.supervisor import Assignment, Supervisor
from trainer.writing import CheckpointWriter

MB = 1_000_000
NUMBERS = 100_000
"""Parameters: 0.4 MB of adapter and 0.8 MB of optimizer state."""
DEADLINE_S = 60.0

Mount = Callable[[str], Path]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Mounts a file system in memory, with limits."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system takes root")
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        path = tmp_path / f"disk{len(mounted)}"
        path.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            pytest.skip(f"this machine lets even root mount nothing: {done.stderr.strip()}")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried soon."""
    monkeypatch.setattr(writing, "DISK_PAUSE_S", 0.02)
    monkeypatch.setattr(replicator_module, "LONGEST_PAUSE_S", 0.02)
    monkeypatch.setattr(replicator_module, "FIRST_PAUSE_S", 0.02)


class Method:
    """All of a module, as ``trainer.methods.Method``."""

    def __init__(self) -> None:
        self.parameters = {"weight": nn.Parameter(torch.ones(NUMBERS))}

    def metadata(self) -> dict[str, str]:
        return {}


class Training:
    """A checkpoint writer with something to write."""

    def __init__(self, root: Path, *, patience_s: float = DEADLINE_S) -> None:
        method = Method()
        optimizer = torch.optim.AdamW(method.parameters.values())
        method.parameters["weight"].grad = torch.ones(NUMBERS)
        optimizer.step()
        self.stopped = False
        self.problems: list[str] = []
        self.writer = CheckpointWriter(
            root,
            method,
            optimizer,
            lambda step, stall_s, write_s: None,
            on_disk_full=self.problems.append,
            give_up=lambda: self.stopped,
            disk_patience_s=patience_s,
        )

    def save(self, step: int) -> None:
        self.writer.snapshot(Progress(step=step), metrics={}, final=False)


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.01)


def steps(root: Path) -> list[int]:
    """The complete checkpoints, each verified."""
    found = complete_checkpoints(root)
    for checkpoint in found:
        verify(checkpoint.path, checkpoint.manifest.files)
    return [checkpoint.step for checkpoint in found]


def there(root: Path) -> list[int]:
    """The complete checkpoints, unread: they may go at any moment."""
    return [checkpoint.step for checkpoint in complete_checkpoints(root)]


def fill(disk: Path) -> Path:
    """Take all the room that is left."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert os.statvfs(disk).f_bavail == 0
    return filler


def test_a_full_disk_keeps_what_is_good_and_the_save_is_done_once_there_is_room(mount: Mount) -> None:
    disk = mount("size=4m")
    root = disk / "checkpoints"
    root.mkdir()
    training = Training(root)
    training.save(10)
    training.writer.wait()
    filler = fill(disk)

    training.save(20)
    until(lambda: training.writer.waits_for_room, "the writer says that it waits")
    assert steps(root) == [10]
    assert not list(root.glob(".tmp-*")), "what could not be finished takes no room"
    assert "No space left on device" in training.problems[0]
    assert "make room on the node's disk" in training.problems[0]

    filler.unlink()
    training.writer.wait()
    assert steps(root) == [20, 10]
    assert len(training.problems) == 1, "told once"
    assert not training.writer.waits_for_room


def test_superseded_checkpoints_make_room_for_the_next(mount: Mount) -> None:
    root = mount("size=5m")  # room for four
    training = Training(root)
    for step in (10, 20, 30, 40, 50, 60):
        training.save(step)
        training.writer.wait()
        assert steps(root)[:2] == [step, step - 10][: 2 if step > 10 else 1]
    assert training.problems == []
    assert len(steps(root)) < 6


def test_of_two_one_goes_if_it_must_and_the_last_never(mount: Mount) -> None:
    root = mount("size=3m")  # room for two
    training = Training(root)
    for step in (10, 20, 30):
        training.save(step)
        training.writer.wait()
    assert steps(root) == [30, 20]
    fill(root)
    training.save(40)
    training.writer.wait()
    assert steps(root) == [40, 30], "step 20 made room, and the one that was good is still there"


@pytest.mark.parametrize("how", ["asked to stop", "out of patience"])
def test_a_disk_that_stays_full_ends_the_attempt_in_the_end(mount: Mount, how: str) -> None:
    root = mount("size=2m")
    training = Training(root, patience_s=DEADLINE_S if how == "asked to stop" else 0.0)
    training.save(10)
    training.writer.wait()
    fill(root)
    training.save(20)
    if how == "asked to stop":
        until(lambda: training.writer.waits_for_room, "the writer says that it waits")
        training.stopped = True
    with pytest.raises(DiskFull, match=r"DISK_FULL: .*No space left on device") as caught:
        training.writer.wait()
    assert end_reason(caught.value.exit_code) is EndReason.DISK_FULL
    assert steps(root) == [10]


def test_a_disk_without_inodes_says_how_many_files_fit(mount: Mount) -> None:
    root = mount("size=50m,nr_inodes=12")
    training = Training(root, patience_s=0.0)
    training.save(10)
    training.writer.wait()
    for n in range(12):
        try:
            (root / f"file{n}").touch()
        except OSError:
            break
    training.save(20)
    with pytest.raises(DiskFull, match=r"MB and 0 more files fit"):
        training.writer.wait()
    assert steps(root) == [10]


def test_a_read_only_disk_ends_the_attempt_at_once(mount: Mount) -> None:
    root = mount("size=5m")
    training = Training(root)
    training.save(10)
    training.writer.wait()
    subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
    training.save(20)
    with pytest.raises(DiskFull, match="Read-only file system"):
        training.writer.wait()
    assert steps(root) == [10]
    assert training.problems == [], "nothing to wait for"


def test_events_on_a_full_disk_are_lost_and_hurt_nobody(mount: Mount) -> None:
    disk = mount("size=1m")
    run_dir = RunDir(disk)
    append_event(run_dir.events, "step", step=1)
    filler = fill(disk)
    for step in range(2, 200):
        append_event(run_dir.events, "step", step=step)
    filler.unlink()
    append_event(run_dir.events, "step", step=200)
    append_event(run_dir.events, "step", step=201)
    told = [event["step"] for _, event in read_events(run_dir.events)]
    assert (told[0], told[-1]) == (1, 201)


@pytest.mark.parametrize("options", ["size=1m,ro", "size=4k,nr_inodes=1"])
def test_an_attempt_on_an_unusable_disk_ends_with_a_clear_word(mount: Mount, options: str) -> None:
    store = MemoryStore()
    run_log(store, RUN).append(claimed())
    spec = RunSpec(base=Base(model="none", max_train_steps=6), dataset=Dataset(path="none"))
    supervisor = Supervisor(
        store,
        Assignment(run_id=RUN, attempt=1, incarnation=incarnation(1)),
        spec,
        Options(),
        scratch=mount(options) / "scratch",
        ledger=run_log(store, RUN),
    )
    final = supervisor.run()
    assert final.exit_code == EXIT_DISK_FULL
    assert "scratch" in final.error
    assert "Read-only file system" in final.error or "No space left on device" in final.error


@pytest.mark.parametrize(
    ("sizes", "keep", "limit", "goes"),
    [
        ([], 2, 0, 0),
        ([9, 9], 2, 0, 0),
        ([9, 9, 9], 2, 0, 1),
        ([9, 9, 9, 9], 2, 27, 1),
        ([9, 9, 9, 9], 2, 36, 0),
        ([90, 1, 1, 1], 2, 91, 2),
        ([1, 1, 90, 1], 2, 50, 2),
        ([9, 9, 9], 1, 0, 2),
    ],
)
def test_the_spool_keeps_the_newest_and_what_fits(sizes: list[int], keep: int, limit: int, goes: int) -> None:
    assert superfluous(sizes, keep=keep, limit_bytes=limit) == goes


class Unreachable:
    """A store that is away until it is back."""

    def __init__(self) -> None:
        self.back = False
        self.published: list[int] = []
        self.tries = 0

    def publish(self, checkpoint: LocalCheckpoint) -> None:
        self.tries += 1
        if not self.back:
            raise OSError("unreachable")
        self.published.append(checkpoint.step)


@pytest.fixture
def store() -> Unreachable:
    return Unreachable()


Start = Callable[..., Replicator]


@pytest.fixture
def start(tmp_path: Path, store: Unreachable) -> Iterator[Start]:
    started: list[Replicator] = []

    def ignore(error: Fenced) -> None:
        pass

    def start(**options: float) -> Replicator:
        replicator = Replicator(tmp_path, store.publish, on_fenced=ignore, **options)  # type: ignore[arg-type]
        started.append(replicator)
        replicator.start()
        return replicator

    yield start
    for replicator in started:
        replicator.stop()


def test_what_cannot_be_sent_is_spooled_within_a_limit_and_sent_newest_first(
    tmp_path: Path, store: Unreachable, start: Start
) -> None:
    files = {"adapter.safetensors": bytes(100_000)}
    write_checkpoint(tmp_path, 10, files=files)
    replicator = start(spool_limit_bytes=350_000)
    for step in (20, 30, 40, 50):
        before = store.tries
        write_checkpoint(tmp_path, step, files=files)
        until(lambda before=before: store.tries > before + 1, "the newest was tried")  # type: ignore[misc]
    until(lambda: there(tmp_path) == [50, 40, 30], "what exceeds the limit is gone, and only that")
    store.back = True
    assert replicator.drain(DEADLINE_S)
    assert store.published == [50]
    until(lambda: there(tmp_path) == [50, 40], "what is of no more use is gone")


def test_a_dead_observer_is_replaced(tmp_path: Path, store: Unreachable, start: Start) -> None:
    store.back = True
    replicator = start(rescan_s=0.05)
    dead = replicator._observer
    assert dead is not None
    for emitter in dead.emitters:
        emitter.stop()
        emitter.join()
    until(lambda: replicator._observer not in (None, dead), "another observer watches")
    replicator._rescan_s = 3600.0  # from now on only an event can tell
    write_checkpoint(tmp_path, 10)
    assert replicator.drain(DEADLINE_S)
    write_checkpoint(tmp_path, 20)
    until(lambda: store.published == [10, 20], "the new observer told of it")


def test_a_system_without_watches_left_loses_nothing_but_time(
    tmp_path: Path,
    store: Unreachable,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from watchdog.observers.inotify import InotifyObserver

    def full(self: object) -> None:
        raise OSError(errno.ENOSPC, "inotify watch limit reached")

    monkeypatch.setattr(InotifyObserver, "start", full)
    store.back = True
    start(rescan_s=0.02)
    for step in (10, 20):
        write_checkpoint(tmp_path, step)
        until(lambda step=step: step in store.published, f"step {step} was found")  # type: ignore[misc]
    told = [record for record in caplog.records if "inotify watch limit reached" in record.message]
    assert len(told) == 1, "told once, tried each time"


def test_uploading_waits_for_training_on_a_busy_machine(tmp_path: Path, start: Start) -> None:
    ours = threading.get_native_id()
    before = os.getpriority(os.PRIO_PROCESS, ours)
    replicator = start()
    thread = replicator._thread.native_id
    assert thread is not None
    nice = min(before + replicator_module.NICENESS, 19)  # the most there is
    until(lambda: os.getpriority(os.PRIO_PROCESS, thread) == nice, "the replicator's thread is nice")
    assert os.getpriority(os.PRIO_PROCESS, ours) == before, "and no other"
