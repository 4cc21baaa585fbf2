"""A local Ray cluster for tests that kill parts of it, by exact pid, and the processes to aim at."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

from orchestrator.on_ray import local_ray
from orchestrator.on_ray.local_ray import LocalRay

T = TypeVar("T")

TRAINER = "trainer.process"


def wait_for(what: str, look: Callable[[], T | None], timeout_s: float) -> T:
    """Return the first result of ``look`` that is neither None nor False."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = look()
        if found is not None and found is not False:
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited {timeout_s:.0f} s in vain for {what}")


@contextlib.contextmanager
def running_cluster(home: Path, nodes: int, cpus: int) -> Iterator[LocalRay]:
    """A cluster of its own, to which this process is connected; nothing of it is left afterwards."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ORCHESTRATE_HOME", str(home))
        cluster = local_ray.start(nodes=nodes, cpus=cpus)
        known = descendants(cluster.host_pid)
        try:
            local_ray.connect(cluster.address)
            yield cluster
        finally:
            ray.shutdown()
            known |= descendants(cluster.host_pid)
            local_ray.stop(cluster)
            left = [pid for pid in known if psutil.pid_exists(pid) and not _zombie(pid)]
            assert not left, f"processes are left: {[_shown(pid) for pid in left]}"


def descendants(pid: int) -> set[int]:
    """Pids of everything under a process, without itself."""
    try:
        return {child.pid for child in psutil.Process(pid).children(recursive=True)}
    except psutil.NoSuchProcess:
        return set()


def trainers(root_pid: int) -> list[psutil.Process]:
    """The training processes under a process, spares included."""
    found = []
    for pid in descendants(root_pid):
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            if TRAINER in process.cmdline():
                found.append(process)
    return found


def kill_cluster(cluster: LocalRay) -> None:
    """SIGKILL to the host and all that runs under it: every machine lost at once."""
    doomed = [cluster.host_pid, *descendants(cluster.host_pid)]
    for pid in doomed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_for("the cluster's end", lambda: all(not psutil.pid_exists(p) or _zombie(p) for p in doomed), 20)


def alive(pid: int) -> bool:
    """Whether a process still does something: one that has ended may wait for its parent to notice."""
    return psutil.pid_exists(pid) and not _zombie(pid)


def _zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _shown(pid: int) -> str:
    with contextlib.suppress(psutil.Error):
        return f"{pid} {' '.join(psutil.Process(pid).cmdline())[:80]}"
    return str(pid)
