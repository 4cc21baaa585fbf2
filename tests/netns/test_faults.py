"""Real faults on real machines of a network: a row each, and what it cost.

Each row is a sweep of two runs on three nodes: one is hit, the other must not notice.
"""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.cluster import alive
from support.fake_metadata import announce
from support.netns_cluster import NetnsCluster
from support.rows import RowResult
from support.trial import EVERY, POLL_S, Trial

from storage.records import EndReason

pytestmark = [pytest.mark.netns, pytest.mark.timeout(600)]

BEFORE = 20
"""Steps that are committed when the fault strikes."""

Strike = Callable[[Trial, str], None]
"""Lets a fault happen to the node of a run, for as long as it lasts."""


def node_killed(trial: Trial, run_id: str) -> None:
    node = trial.node_of(run_id)
    trial.look()
    for pid in node.machine.freeze():  # so that no step is made between the look and the kill
        assert pid
    trial.look()
    node.power_off()


def node_frozen(seconds: float) -> Strike:
    def strike(trial: Trial, run_id: str) -> None:
        machine = trial.node_of(run_id).machine
        machine.freeze()
        trial.watch(seconds)
        machine.thaw()

    return strike


def link_down(seconds: float) -> Strike:
    def strike(trial: Trial, run_id: str) -> None:
        machine = trial.node_of(run_id).machine
        machine.unplug()
        trial.watch(seconds)
        machine.plug_in()

    return strike


def way_lost(seconds: float, to: str) -> Strike:
    """The node reaches either the head or the store, not both."""

    def strike(trial: Trial, run_id: str) -> None:
        machine, net = trial.node_of(run_id).machine, trial.cluster.net
        other = trial.cluster.head.machine if to == "head" else net.hub
        machine.lose_way_to(other)
        trial.watch(seconds)
        machine.find_way_to(other)

    return strike


# The profile of health checks decides which of these faults are over before the node is taken for dead.
@pytest.mark.parametrize(
    ("profile", "fault", "strike", "restarts"),
    [
        ("fast", "link down 5 s", link_down(5), 0),
        ("fast", "node killed", node_killed, 1),
        ("fast", "node frozen 20 s", node_frozen(20), 1),
        ("fast", "link down 20 s", link_down(20), 1),
        ("fast", "link down 90 s", link_down(90), 1),
        ("patient", "link down 5 s", link_down(5), 0),
        ("patient", "node killed", node_killed, 1),
        ("patient", "node frozen 20 s", node_frozen(20), 0),
        ("patient", "link down 20 s", link_down(20), 0),
        ("patient", "link down 90 s", link_down(90), 1),
        ("patient", "store out of reach 30 s", way_lost(30, "store"), 0),
        ("patient", "head out of reach 20 s", way_lost(20, "head"), 0),
        ("patient", "head out of reach 90 s", way_lost(90, "head"), 1),
    ],
)
def test_a_fault(
    profile: str,
    fault: str,
    strike: Strike,
    restarts: int,
    cluster: NetnsCluster,
    world: Path,
    calm: Callable[[], dict[int, str]],
    rows: list[RowResult],
    tmp_path: Path,
) -> None:
    cluster.mend(profile)
    trial = Trial.begin(cluster, world, tmp_path, runs=2)
    rows.append(hit(trial, fault, strike, calm, restarts=restarts))
    assert rows[-1].holds, rows[-1]


def test_a_killed_controller(
    cluster: NetnsCluster,
    world: Path,
    calm: Callable[[], dict[int, str]],
    rows: list[RowResult],
    tmp_path: Path,
) -> None:
    cluster.mend("fast")
    trial = Trial.begin(cluster, world, tmp_path, runs=2)
    trial.wait_until_training(BEFORE)
    before = trial.trainer_pids()
    controller = cluster.controller()
    assert controller is not None
    at = time.time()
    os.kill(controller.pid, signal.SIGKILL)

    def successor() -> bool:
        found = cluster.controller()
        return found is not None and found.pid != controller.pid

    trial.wait_for("another controller", successor, 60)
    back_s = time.time() - at
    needless = trial.trainer_pids() != before
    row = conclude(trial, "controller killed", calm, restarts=0, at=at, detect_s=back_s, needless=needless)
    rows.append(row)
    assert row.holds, row


def test_a_killed_head(
    cluster: NetnsCluster,
    world: Path,
    calm: Callable[[], dict[int, str]],
    rows: list[RowResult],
    tmp_path: Path,
) -> None:
    """GCS, dashboard, controller, all at once; the head's machine comes up again and runs ``supervise``."""
    cluster.mend("fast")
    trial = Trial.begin(cluster, world, tmp_path, runs=2)
    trial.wait_until_training(BEFORE)
    old = [process for node in cluster.workers.values() for process in node.trainers]
    at = time.time()
    cluster.head.power_off()
    supervisor = trial.supervise()

    def train_again() -> bool:
        cluster.keep_workers_up()
        states = [trial.state(run_id) for run_id in trial.run_ids]
        return all(len(s.attempts) > 1 and s.attempts[-1].started for s in states)

    trial.wait_for("both runs to train again", train_again, 240)
    trial.wait_for("the old trainers' end", lambda: not any(alive(p.pid) for p in old), 120)
    row = conclude(trial, "head killed", calm, restarts=2, at=at)
    supervisor.wait(timeout=60)
    rows.append(row)
    assert row.holds, row
    assert supervisor.returncode == 0


@pytest.mark.parametrize("warning_s", [120, 30, 5])
def test_a_notice(
    warning_s: int,
    cluster: NetnsCluster,
    world: Path,
    calm: Callable[[], dict[int, str]],
    rows: list[RowResult],
    tmp_path: Path,
) -> None:
    """By AWS's metadata service at its own address; the power goes when it said so, or once all is safe."""
    cluster.mend("fast")
    trial = Trial.begin(cluster, world, tmp_path, runs=2)
    trial.wait_until_training(BEFORE)
    run_id, node = trial.run_ids[0], trial.node_of(trial.run_ids[0])
    at = time.time()
    announce(cluster.notice_file(node), warning_s)

    while time.time() < at + warning_s and not trains_elsewhere(trial, run_id):
        trial.watch(POLL_S)
    node.power_off()
    trial.wait_for("a first step of the next attempt", lambda: trains_elsewhere(trial, run_id), 120)
    row = conclude(trial, f"notice {warning_s} s", calm, restarts=1, at=at)
    rows.append(row)
    assert row.holds, row
    assert row.lost_steps == 0
    ended = trial.state(run_id).attempts[0].ended
    assert ended is not None
    assert ended.reason is EndReason.SPOT_NOTICE


def hit(
    trial: Trial, fault: str, strike: Strike, calm: Callable[[], dict[int, str]], *, restarts: int
) -> RowResult:
    """Let the fault happen to the first run's node, and see its run train on, there or elsewhere."""
    trial.wait_until_training(BEFORE)
    run_id, before = trial.run_ids[0], trial.trainer_pids()
    old = trial.node_of(run_id).trainers
    known = trial.state(run_id).committed_step
    at = time.time()
    strike(trial, run_id)
    back_at = time.time()
    if not restarts:
        trial.wait_for("new commits", lambda: trial.state(run_id).committed_step > known + EVERY, 120)
        needless = trial.trainer_pids() != before
        return conclude(trial, fault, calm, restarts=0, at=at, needless=needless)
    trial.wait_for("a first step of the next attempt", lambda: trains_elsewhere(trial, run_id), 180)
    trial.wait_for("the old trainer's end", lambda: not any(alive(p.pid) for p in old), 120)
    again = trial.state(run_id).attempts[1].started
    zombie_s = time.time() - max(back_at, again.at if again else 0.0)
    return conclude(trial, fault, calm, restarts=1, at=at, zombie_s=max(0.0, zombie_s))


def trains_elsewhere(trial: Trial, run_id: str) -> bool:
    attempts = trial.state(run_id).attempts
    return len(attempts) > 1 and attempts[-1].started is not None


def conclude(
    trial: Trial,
    fault: str,
    calm: Callable[[], dict[int, str]],
    *,
    restarts: int,
    at: float,
    detect_s: float | None = None,
    zombie_s: float | None = None,
    needless: bool = False,
) -> RowResult:
    """Let the sweep end, and say what the fault did to its first run."""
    states = trial.finish()
    again_s = None
    if len(states[0].attempts) > 1:
        first, second = states[0].attempts[:2]
        detect_s = first.ended.at - at if first.ended else None
        again_s = second.started.at - at if second.started else None
    made = sum(len(state.attempts) - 1 for state in states)
    return RowResult(
        fault=fault,
        profile=trial.cluster.profile,
        recovered=trial.same_bytes(calm()),
        restarts=made,
        lost_steps=sum(trial.lost_steps()),
        detect_s=detect_s,
        again_s=again_s,
        zombie_commits=trial.zombie_commits(),
        zombie_s=zombie_s,
        needless_restarts=max(int(needless), made - restarts),
        left_behind=len(trial.left_behind()),
    )
