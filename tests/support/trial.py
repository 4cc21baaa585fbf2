"""A small sweep on machines of a network, watched from outside: logs, trainers, and the events they write."""

import contextlib
import itertools
import secrets
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from support.evidence import adapter, litter, zombie_commits
from support.gate import Gate
from support.netns_cluster import NetnsCluster, Node

from orchestrator.grid.sweep import Sweep, load
from storage.log import RunLog, run_log
from storage.object_store import ObjectStore
from storage.records import Outcome, RunEntry
from storage.run_state import Attempt, RunState
from storage.url import open_store
from trainer.rundir import RunDir, read_events

STEPS = 250
EVERY = 10
POLL_S = 0.2


def plan(
    world: Path, folder: Path, store_url: str, *, runs: int, steps: int = STEPS, extra: str = ""
) -> Sweep:
    """A sweep of ``runs`` runs that differ in their seed, each held open at its end by the folder's gate."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "grid.yaml"
    file.write_text(f"""
name: {folder.name}
parameters: {{seed: {{values: {list(range(runs))}}}}}
base: {{model: {world / "base"}, resolution: 32, max_train_steps: {steps}, train_batch_size: 2, rank: 4,
  gradient_accumulation_steps: 2, lora_dropout: 0.1, learning_rate: 1e-3, lr_scheduler: cosine,
  optimizer: adamw}}
dataset: {{path: {world / "images"}, val_fraction: 0.2, caption_dropout: 0.2, random_flip: true}}
storage: {{url: "{store_url}"}}
resources: {{gpus: 0, cpus: 1, notices: aws}}
checkpoint: {{every: {EVERY}, grace_s: 1}}
recovery: {{max_failures: 50, backoff_s: 0.1, max_backoff_s: 0.5}}
{extra}
{Gate(folder).grid}""")
    return load(file)


@dataclass(slots=True)
class Trial:
    """One sweep on a cluster that is up."""

    cluster: NetnsCluster
    sweep: Sweep
    folder: Path
    store: ObjectStore
    reached: dict[tuple[str, int], int] = field(default_factory=dict)
    """The furthest step that each attempt was seen to make, on its node's own disk."""
    _logs: dict[str, RunLog] = field(default_factory=dict)
    _offsets: dict[Path, int] = field(default_factory=dict)

    @classmethod
    def begin(
        cls,
        cluster: NetnsCluster,
        world: Path,
        folder: Path,
        *,
        runs: int,
        steps: int = STEPS,
        held: bool = True,
    ) -> "Trial":
        """Submit the sweep and let its controller go to work; ``held``: no run ends before ``finish``."""
        folder = folder / f"sweep-{secrets.token_hex(3)}"
        sweep = plan(world, folder, cluster.store.url_of("netns"), runs=runs, steps=steps)
        if not held:
            (folder / "go").touch()
        cluster.orchestrate("sweep", str(folder / "grid.yaml"), "-y", "-d", "--address", cluster.address)
        return cls(cluster, sweep, folder, open_store(sweep.storage.url))

    def supervise(self) -> subprocess.Popen[bytes]:
        """Start what keeps the head and the controller up, on a head's machine that is empty."""
        cluster = self.cluster
        command = [sys.executable, "-m", "orchestrator", "supervise", self.sweep.name]
        options = ["--store", self.sweep.storage.url, "--address", cluster.address]
        head = ["--head", shlex.join(cluster.head_command()), "--detection", cluster.profile]
        return cluster.start_process(cluster.head, [*command, *options, *head])

    @property
    def run_ids(self) -> list[str]:
        return [run.run_id for run in self.sweep.runs]

    def state(self, run_id: str) -> RunState:
        """As its log has it now; only what is new is read."""
        return self._logs.setdefault(run_id, run_log(self.store, run_id)).refresh()

    def entries(self, run_id: str) -> tuple[RunEntry, ...]:
        log = run_log(self.store, run_id)  # from its first entry on
        log.refresh()
        return log.entries()

    def wait_until_training(self, steps: int, timeout_s: float = 180) -> None:
        """Until every run has committed so many steps, and trains."""
        for run_id in self.run_ids:
            self.wait_for(
                f"step {steps} of {run_id}",
                lambda run_id=run_id: (
                    self.state(run_id).running and self.state(run_id).committed_step >= steps
                ),
                timeout_s,
            )

    def attempt(self, run_id: str) -> Attempt:
        running = self.state(run_id).running
        assert running is not None
        return running

    def node_of(self, run_id: str) -> Node:
        return self.cluster.node_at(self.attempt(run_id).claimed.node)

    def trainer_pids(self) -> dict[str, int]:
        """The training process of each running attempt, by run."""
        found = {}
        for node in self.cluster.workers.values():
            for process in node.trainers:
                with contextlib.suppress(psutil.Error):
                    for run_id in self.run_ids:
                        if any(f"/{run_id}-a" in file.path for file in process.open_files()):
                            found[run_id] = process.pid
        return found

    def look(self) -> None:
        """Note how far each attempt is: its folder goes with it."""
        for node in self.cluster.workers.values():
            for folder in node.disk.glob("orchestrate-*/*/*-a*-*"):
                run_id, attempt, _ = folder.name.rsplit("-", 2)
                if run_id not in self.run_ids:
                    continue
                key = run_id, int(attempt.removeprefix("a"))
                for offset, event in read_events(RunDir(folder).events, self._offsets.get(folder, 0)):
                    self._offsets[folder] = offset
                    if event["event"] == "step":
                        self.reached[key] = max(self.reached.get(key, 0), event["step"])

    def watch(self, seconds: float) -> None:
        """Let a fault last so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.look()
            time.sleep(POLL_S)

    def wait_for(self, what: str, look: Any, timeout_s: float) -> Any:
        """Return what ``look`` finds, noting how far the attempts get meanwhile."""
        deadline = time.monotonic() + timeout_s
        while not (found := look()):
            assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s in vain for {what}"
            self.look()
            time.sleep(POLL_S)
        return found

    def finish(self, timeout_s: float = 300) -> list[RunState]:
        """Let the runs end; returns their states, once what they left is deleted."""
        (self.folder / "go").touch()
        for run_id in self.run_ids:
            self.wait_for(
                f"the end of {run_id}", lambda run_id=run_id: self.state(run_id).finished, timeout_s
            )
            self.wait_for(
                "what it left to be deleted", lambda run_id=run_id: not self.state(run_id).retired, 90
            )
        self.wait_for("the controller's end", lambda: self.cluster.controller() is None, 60)
        return [self.state(run_id) for run_id in self.run_ids]

    def same_bytes(self, calm: dict[int, str]) -> bool:
        """Whether every run has succeeded with the adapter that it has without a fault."""
        return all(
            self.state(run_id).outcome is Outcome.SUCCEEDED
            and adapter(self.store, run_id, self.folder / "fetched" / run_id) == calm[seed]
            for seed, run_id in enumerate(self.run_ids)
        )

    def left_behind(self) -> list[str]:
        """Processes, data that no record names, and unfinished uploads."""
        with contextlib.suppress(AssertionError):
            self.wait_for("the trainers' end", lambda: not self._processes(), 30)
        data = [key for run_id in self.run_ids for key in litter(self.store, run_id, self.state(run_id))]
        uploads = self.store.abort_uploads("runs/")
        return [*self._processes(), *data, *(f"upload {n}" for n in range(uploads))]

    def lost_steps(self) -> list[int]:
        """For each attempt that had a successor, the steps that it made and that were made again."""
        return [
            max(0, self.reached.get((run_id, attempt.number), 0) - following.resumed_from)
            for run_id in self.run_ids
            for attempt, following in itertools.pairwise(self.state(run_id).attempts)
        ]

    def zombie_commits(self) -> int:
        return sum(zombie_commits(self.entries(run_id)) for run_id in self.run_ids)

    def _processes(self) -> list[str]:
        """Trainers and agents: with the sweep over there should be none."""
        nodes = self.cluster.workers.values()
        found = [
            p
            for node in nodes
            for word in ("trainer.process", "ray::Agent")
            for p in node.machine.processes(word)
        ]
        return [f"process {process.pid}" for process in found]
