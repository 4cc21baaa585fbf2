"""A storm over a sweep: random faults on machines of a network, every few seconds, from a seed.

    python -m proof.storm --seed 1 --minutes 10

First a calm sweep of eight runs, for its adapters and its seconds. Then the same sweep, again and again until
the time is over, while nodes lose their power, freeze, lose their cable or their way to head or store, and
are announced to end; while trainers, agents, the controller and the head are killed. Whatever ends by itself
is started again, as service managers would. The same seed gives the same faults; what they hit is left to the
machine. In the end every run must have succeeded with the calm sweep's very bytes, and nothing may be left.
The last line is one JSON object; the exit status says whether it holds. Needs root and network namespaces.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from support.evidence import adapter
from support.fake_metadata import announce, withdraw
from support.namespaces import why_no_namespaces
from support.netns_cluster import NetnsCluster, Node, netns_cluster
from support.tiny_world import build_base, build_images
from support.trial import POLL_S, Trial

RUNS = 8
WORKERS = 4
STEPS = 300
PAUSE_S = (1.0, 6.0)
"""Between two faults."""
START_AGAIN_S = 3.0
"""What has ended is started again so much later."""
CALM_TIMEOUT_S = 900.0

Undo = Callable[[], None]


def main() -> int:
    parser = argparse.ArgumentParser(prog="proof.storm", description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--model", action="store_true", help="train a tiny LoRA, not a chain of digests")
    arguments = parser.parse_args()
    if reason := why_no_namespaces():
        print(f"no storm here: {reason}", file=sys.stderr)
        return 2
    temporary = tempfile.TemporaryDirectory(prefix="storm-", ignore_cleanup_errors=True)
    with (
        temporary as name,
        netns_cluster(Path(name) / "cluster", workers=WORKERS, chain=not arguments.model) as cluster,
    ):
        world = Path(name) / "world"
        build_base(world / "base")
        build_images(world / "images", count=10)
        figures = storm(cluster, world, Path(name), arguments.seed, arguments.minutes * 60, arguments.runs)
    print(json.dumps(figures))
    return 0 if figures["holds"] else 1


def storm(
    cluster: NetnsCluster, world: Path, folder: Path, seed: int, seconds: float, runs: int
) -> dict[str, object]:
    cluster.mend("fast")
    calm, calm_s = _calm_sweep(cluster, world, folder, runs)
    weather = Weather(cluster, random.Random(seed), until=time.monotonic() + seconds)
    trials: list[Trial] = []
    took: list[float] = []
    while not trials or time.monotonic() < weather.until:
        cluster.mend("fast")
        began = time.monotonic()
        trials.append(Trial.begin(cluster, world, folder, runs=runs, steps=STEPS, held=False))
        weather.rage(trials[-1])
        took.append(time.monotonic() - began)
        faults = sum(weather.struck.values())
        say(f"sweep {len(trials)} is over after {took[-1]:.0f} s, {faults} faults so far")
    weather.clear()
    lost = [steps for trial in trials for steps in trial.lost_steps()]
    left = [thing for trial in trials for thing in trial.left_behind()]
    same = all(trial.same_bytes(calm) for trial in trials)
    zombies = sum(trial.zombie_commits() for trial in trials)
    if left:
        say(f"left behind: {left}")
    return {
        "faults": sum(weather.struck.values()),
        "kinds": dict(sorted(weather.struck.items())),
        "sweeps": len(trials),
        "runs": sum(len(trial.run_ids) for trial in trials),
        "attempts": sum(len(trial.state(run_id).attempts) for trial in trials for run_id in trial.run_ids),
        "bit_identical": same,
        "left_behind": len(left),
        "zombie_commits": zombies,
        "lost_steps_p50": statistics.median(lost) if lost else 0,
        "lost_steps_max": max(lost, default=0),
        "goodput": round(calm_s * len(took) / sum(took), 3),
        "seed": seed,
        "holds": same and not left and not zombies,
    }


def _calm_sweep(cluster: NetnsCluster, world: Path, folder: Path, runs: int) -> tuple[dict[int, str], float]:
    began = time.monotonic()
    trial = Trial.begin(cluster, world, folder, runs=runs, steps=STEPS, held=False)
    trial.finish(CALM_TIMEOUT_S)
    took = time.monotonic() - began
    say(f"the calm sweep took {took:.0f} s")
    digests = {
        seed: adapter(trial.store, run_id, folder / "calm" / run_id)
        for seed, run_id in enumerate(trial.run_ids)
    }
    return digests, took


@dataclass(slots=True)
class Weather:
    """Strikes every few seconds until its time is over, and starts again what has ended."""

    cluster: NetnsCluster
    chance: random.Random
    until: float
    struck: Counter[str] = field(default_factory=Counter)
    _undo: list[tuple[float, str, Undo]] = field(default_factory=list)
    _next: float = 0.0
    _down_since: dict[str, float] = field(default_factory=dict)
    _supervisor: subprocess.Popen[bytes] | None = None

    def rage(self, trial: Trial) -> None:
        """Strike until the sweep, or the storm, is over; then let the sweep come to its end."""
        self._supervisor = trial.supervise()
        over_by = self.until + CALM_TIMEOUT_S
        while not all(trial.state(run_id).finished for run_id in trial.run_ids):
            now = time.monotonic()
            if now > over_by:
                raise AssertionError(f"not over {CALM_TIMEOUT_S:.0f} s after the storm: {_shown(trial)}")
            trial.look()
            self._undo_due(now)
            if now >= self.until:
                self.clear()
            elif now >= self._next:
                self._next = now + self.chance.uniform(*PAUSE_S)
                self._strike(trial)
            self._keep_up(trial, now)
            time.sleep(POLL_S)
        self.clear()
        deadline = time.monotonic() + CALM_TIMEOUT_S
        while self._supervisor.poll() != 0:  # it waits until all that is to be deleted is
            assert time.monotonic() < deadline, f"supervise does not end; see {self.cluster.folder}"
            self._keep_up(trial, time.monotonic())
            time.sleep(POLL_S)

    def clear(self) -> None:
        """End every fault that lasts."""
        self._undo_due(float("inf"))

    def _undo_due(self, now: float) -> None:
        due = [entry for entry in self._undo if entry[0] <= now]
        self._undo = [entry for entry in self._undo if entry[0] > now]
        for _, _, undo in due:
            with contextlib.suppress(subprocess.CalledProcessError):
                undo()

    def _keep_up(self, trial: Trial, now: float) -> None:
        """What service managers do."""
        for name, node in self.cluster.workers.items():
            if node.up:
                self._down_since.pop(name, None)
            elif now - self._down_since.setdefault(name, now) >= START_AGAIN_S:
                self._down_since.pop(name)
                self.cluster.start_worker(node)
        if self._supervisor and self._supervisor.poll() not in (None, 0):
            self._supervisor = trial.supervise()

    def _strike(self, trial: Trial) -> None:
        """One fault, of a worker on which none lasts, or of the head."""
        kind = self.chance.choices(list(KINDS), weights=[weight for weight, _ in KINDS.values()])[0]
        place, seconds = self.chance.random(), self.chance.random()
        hit = {name for _, name, _ in self._undo}
        sound = [node for name, node in self.cluster.workers.items() if node.up and name not in hit]
        if not sound:
            return
        node = sound[int(place * len(sound))]
        try:
            lasting = KINDS[kind][1](self, node, seconds)
        except NothingThere:  # to kill: no fault
            return
        self.struck[kind] += 1
        say(f"{kind} on {node.machine.name}" if kind not in ON_HEAD else kind)
        if lasting:
            self._undo.append((time.monotonic() + lasting[0], node.machine.name, lasting[1]))


Lasting = tuple[float, Undo] | None
Strike = Callable[[Weather, Node, float], Lasting]


def power_cut(weather: Weather, node: Node, share: float) -> Lasting:
    node.power_off()
    return None


def freeze(weather: Weather, node: Node, share: float) -> Lasting:
    node.machine.freeze()
    return 1 + 19 * share, node.machine.thaw


def unplug(weather: Weather, node: Node, share: float) -> Lasting:
    node.machine.unplug()
    return 1 + 24 * share, node.machine.plug_in


def lose_head(weather: Weather, node: Node, share: float) -> Lasting:
    head = weather.cluster.head.machine
    node.machine.lose_way_to(head)
    return 1 + 24 * share, lambda: node.machine.find_way_to(head)


def lose_store(weather: Weather, node: Node, share: float) -> Lasting:
    hub = weather.cluster.net.hub
    node.machine.lose_way_to(hub)
    return 1 + 24 * share, lambda: node.machine.find_way_to(hub)


def notice(weather: Weather, node: Node, share: float) -> Lasting:
    """Of 120, 30 or 5 seconds; one in four is withdrawn, and the power goes with the others."""
    warning_s = (120.0, 30.0, 5.0)[int(3 * share)]
    told = weather.cluster.notice_file(node)
    announce(told, warning_s)
    if 3 * share % 1 < 0.25:
        return min(warning_s, 10.0), lambda: withdraw(told)
    return min(warning_s, 20.0), node.power_off


def kill_trainer(weather: Weather, node: Node, share: float) -> Lasting:
    _kill([process.pid for process in node.trainers], share)
    return None


def kill_agent(weather: Weather, node: Node, share: float) -> Lasting:
    _kill([process.ppid() for process in node.trainers], share)
    return None


def kill_controller(weather: Weather, node: Node, share: float) -> Lasting:
    controller = weather.cluster.controller()
    _kill([controller.pid] if controller else [], share)
    return None


def kill_gcs(weather: Weather, node: Node, share: float) -> Lasting:
    _kill([process.pid for process in weather.cluster.head.machine.processes("gcs_server")], share)
    return None


def head_power_cut(weather: Weather, node: Node, share: float) -> Lasting:
    weather.cluster.head.power_off()
    return None


KINDS: dict[str, tuple[int, Strike]] = {
    "power cut": (4, power_cut),
    "frozen": (4, freeze),
    "unplugged": (4, unplug),
    "head out of reach": (3, lose_head),
    "store out of reach": (3, lose_store),
    "notice": (4, notice),
    "trainer killed": (4, kill_trainer),
    "agent killed": (3, kill_agent),
    "controller killed": (2, kill_controller),
    "GCS killed": (1, kill_gcs),
    "head power cut": (1, head_power_cut),
}
"""How often, and what it is."""

ON_HEAD = ("controller killed", "GCS killed", "head power cut")


class NothingThere(Exception):
    """What was to be killed does not run."""


def _kill(pids: list[int], share: float) -> None:
    try:
        os.kill(sorted(pids)[int(share * len(pids))], signal.SIGKILL)
    except (IndexError, ProcessLookupError):
        raise NothingThere from None


def _shown(trial: Trial) -> str:
    states = {run_id: trial.state(run_id) for run_id in trial.run_ids}
    return ", ".join(
        f"{run_id} at {state.committed_step}" for run_id, state in states.items() if not state.finished
    )


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
