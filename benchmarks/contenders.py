"""Who trains on the machines of ``recovery_faults`` while faults happen to them: ours, and Ray Tune."""

import contextlib
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil
from following import Attempts, lost_steps
from harness import BenchmarkFailed, digits_spec, wait_for, wait_until_warm
from support.netns_cluster import NetnsCluster, Node

from orchestrator.grid.sweep import load
from storage.log import run_log
from storage.url import open_store

EVERY = 10
"""Steps between checkpoints."""
STEPS = 1_000_000
"""More than any turn trains."""
TURN_S = 300.0
DRIVER = Path(__file__).resolve().parent / "tune_driver.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one fault, in seconds since it began."""

    again_s: float
    """To the first new step."""
    lost_steps: int
    detect_s: float | None = None
    """Until it was known and on record (ours), or the next process had imported what it needs (Ray Tune)."""
    gap_s: float | None = None
    """The time without any training, where there was no cut-off machine that trained on for nothing."""
    restarts: int = 1
    said: str = ""


class Contender(Protocol):
    """Somebody who trains one run for as long as it takes, and does not give it up."""

    attempts: Attempts

    def settle(self) -> None:
        """Wait until it trains, has made checkpoints, and could go on elsewhere as fast as it ever can."""

    def node(self) -> Node:
        """Where it trains."""

    def detected_s(self, struck_at: float, number: int) -> float:
        """When it knew that the attempt with this index was over, in seconds."""

    def lose_director(self) -> Cost:
        """Kill who decides, and go on."""

    def close(self) -> None: ...


class Ours:
    """A sweep of one run."""

    def __init__(self, cluster: NetnsCluster, folder: Path) -> None:
        self._cluster = cluster
        self._url = cluster.store.url_of("recovery")
        folder.mkdir()
        sweep = load(_grid(folder, self._url))
        self._name, self._run_id = sweep.name, sweep.runs[0].run_id
        cluster.orchestrate("sweep", str(folder / "grid.yaml"), "-y", "-d", "--address", cluster.address)
        self._log = run_log(open_store(self._url), self._run_id)
        self.attempts = Attempts(self._folders)

    def _folders(self) -> list[Path]:
        disks = [node.disk for node in self._cluster.workers.values()]
        return [path for disk in disks for path in disk.glob(f"orchestrate-*/*/{self._run_id}-a*-*")]

    def settle(self) -> None:
        def trains() -> bool:
            running = self._log.refresh().running
            done = self._log.state.committed_step
            return running is not None and bool(running.started) and done >= running.resumed_from + 2 * EVERY

        self.attempts.wait(trains, "two checkpoints of ours", TURN_S, every_s=0.5)
        busy = self.node()
        (free,) = [node for node in self._cluster.workers.values() if node is not busy]
        (spare,) = self.attempts.wait(lambda: free.trainers, "a warm process", 120.0, every_s=0.5)
        wait_until_warm(spare.pid)
        self.attempts.look()

    def node(self) -> Node:
        running = self._log.refresh().running
        assert running is not None
        return self._cluster.node_at(running.claimed.node)

    def detected_s(self, struck_at: float, number: int) -> float:
        ended = self._log.refresh().attempts[number].ended
        assert ended is not None
        return ended.at - struck_at

    def lose_director(self) -> Cost:
        """Ray starts another controller; what trains is told nothing of it."""
        old, count = self._cluster.controller(), len(self.attempts.all)
        assert old is not None
        struck_at = time.time()
        old.kill()

        def successor() -> bool:
            found = self._cluster.controller()
            return found is not None and found.pid != old.pid

        self.attempts.wait(successor, "another controller", 120.0, every_s=0.1)
        back_at = time.time()
        before = self._log.refresh().committed_step

        def commits() -> bool:
            return self._log.refresh().committed_step > before + EVERY

        self.attempts.wait(commits, "commits", 60.0, every_s=0.1)
        if len(self.attempts.all) > count:
            raise BenchmarkFailed("the run began again because its controller was killed")
        gap_s = round(self.attempts.longest_pause_s(struck_at, time.time()), 2)
        return Cost(
            again_s=gap_s,
            lost_steps=0,
            detect_s=round(back_at - struck_at, 2),
            gap_s=gap_s,
            restarts=0,
            said="it trained on; the longest time between two steps",
        )

    def close(self) -> None:
        where = ["--store", self._url, "--address", self._cluster.address]
        self._cluster.orchestrate("cancel", self._name, "-y", *where)
        wait_for(lambda: self._cluster.controller() is None, "the controller's end", timeout_s=90.0)
        nodes = self._cluster.workers.values()
        wait_for(lambda: not any(node.trainers for node in nodes), "the trainers' end", timeout_s=60.0)
        self.attempts.close()


class RayTune:
    """An experiment of one trial, which is tried again for ever."""

    def __init__(self, cluster: NetnsCluster, folder: Path) -> None:
        self._cluster = cluster
        self._folder = folder
        (folder / "tries").mkdir(parents=True)
        (folder / "spec.json").write_text(digits_spec(STEPS).model_dump_json())
        self._driver = self._direct()
        self.attempts = Attempts(lambda: (folder / "tries").iterdir())

    def _direct(self, *restore: str) -> subprocess.Popen[bytes]:
        command = ["env", "TUNE_GLOBAL_CHECKPOINT_S=1", sys.executable, str(DRIVER)]
        command += [self._cluster.address, str(self._folder), str(EVERY), *restore]
        return self._cluster.start_process(self._cluster.head, command)

    def settle(self) -> None:
        def trains() -> bool:
            if self._driver.poll() is not None:
                raise BenchmarkFailed(f"Ray Tune's driver ended; see {self._cluster.folder}")
            kept = len(list((self._folder / "tune").glob("recovery/*/checkpoint_*")))
            new = self.attempts.newest
            return new is not None and kept >= 2 and new.newest >= new.resumed + 2 * EVERY

        self.attempts.wait(trains, "two checkpoints of Ray Tune", TURN_S, every_s=0.5)
        busy = self.node()
        (free,) = [node for node in self._cluster.workers.values() if node is not busy]
        wait_for(lambda: _quiet(free), "a quiet node", timeout_s=120.0)
        self.attempts.look()

    def node(self) -> Node:
        assert self.attempts.newest is not None
        address = (self.attempts.newest.root / "address").read_text()
        return next(n for n in self._cluster.workers.values() if n.machine.address == address)

    def detected_s(self, struck_at: float, number: int) -> float:
        return (self.attempts.all[number + 1].root / "address").stat().st_mtime - struck_at

    def lose_director(self) -> Cost:
        """The trial ends with it, and nobody starts it again: here another driver does, at once."""
        old, number = self.attempts.newest, len(self.attempts.all) - 1
        assert old is not None
        (driver,) = [p for p in self._cluster.head.machine.processes(str(DRIVER)) if "python" in p.name()]
        struck_at = time.time()
        driver.kill()
        self._driver.wait()
        self._driver = self._direct("restore")

        def again() -> bool:
            return len(self.attempts.all) > number + 1 and len(self.attempts.all[number + 1].losses) > EVERY

        self.attempts.wait(again, "the restored experiment", TURN_S)
        new = self.attempts.all[number + 1]
        return Cost(
            again_s=round(new.seen_at[0] - struck_at, 2),
            lost_steps=lost_steps(old, new),
            detect_s=round(self.detected_s(struck_at, number), 2),
            gap_s=round(new.seen_at[0] - old.seen_at[-1], 2),
            said="all ended with the driver; another one was told by hand, at once, to restore it",
        )

    def close(self) -> None:
        for process in self._cluster.head.machine.processes(str(DRIVER)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._driver.wait()
        self.attempts.close()


def _quiet(node: Node) -> bool:
    """Whether what runs there, as processes that Ray holds ready, has come up: it uses next to no CPU."""

    def used_s() -> float:
        total = 0.0
        for pid in node.machine.pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = psutil.Process(pid).cpu_times()
                total += times.user + times.system
        return total

    before = used_s()
    time.sleep(1.0)
    return node.up and used_s() - before < 0.1


def _grid(folder: Path, store_url: str) -> Path:
    """The same run as Tune trains, as the file of a sweep of one."""
    spec = digits_spec(STEPS).model_dump(exclude_unset=True)
    rate = spec["base"].pop("learning_rate")
    grid = {
        "version": 1,
        "name": "recovery",
        "parameters": {"learning_rate": {"values": [rate]}},
        **spec,
        "resources": {"gpus": 0, "cpus": 1, "notices": "aws"},
        "checkpoint": {"every": EVERY},
        "storage": {"url": store_url},
    }
    file = folder / "grid.yaml"
    file.write_text(json.dumps(grid))  # JSON is YAML
    return file
