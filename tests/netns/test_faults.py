"""Real faults on real machines of a network: a row each, and what it cost.

Each row is a sweep of two runs on three nodes: one is hit, the other must not notice.
"""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.fake_metadata import announce
from support.netns_cluster import NetnsCluster
from support.rows import RowResult
from support.trial import POLL_S, Trial

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


# Without a restart: the fault is over before anybody may take the node for dead.
@pytest.mark.parametrize(
    ("fault", "profile", "strike"),
    [
        ("link down 5 s", "fast", link_down(5)),
        ("link down 20 s", "patient", link_down(20)),
        ("node frozen 20 s", "patient", node_frozen(20)),
        ("store cut off 30 s", "patient", way_lost(30, "store")),
    ],
)
def test_what_passes_restarts_nothing(
    fault: str,
    profile: str,
    strike: Strike,
    cluster: NetnsCluster,
    world: Path,
    calm: Callable[[], dict[int, str]],
    rows: list[RowResult],
    tmp_path: Path,
) -> None:
    cluster.mend(profile)
    trial = Trial.begin(cluster, world, tmp_path, runs=2)
    trial.wait_until_training(BEFORE)
    before = trial.trainer_pids()
    strike(trial, trial.run_ids[0])
    healed = [trial.state(run_id).committed_step for run_id in trial.run_ids]
    trial.wait_for("a new commit", lambda: trial.state(trial.run_ids[0]).committed_step > healed[0], 120)
    assert trial.trainer_pids() == before
    row = conclude(trial, fault, profile, calm, restarts=0)
    rows.append(row)
    assert row.holds, row


# With one restart: the node is gone, or nobody can tell that it is not.
@pytest.mark.parametrize(
    ("fault", "profile", "strike"),
    [
        ("node killed", "fast", node_killed),
        ("node frozen 30 s", "fast", node_frozen(30)),
        ("link down 20 s", "fast", link_down(20)),
        ("link down 90 s", "patient", link_down(90)),
        ("head cut off 90 s", "patient", way_lost(90, "head")),
    ],
)
def test_what_is_lost_is_replaced_once(
    fault: str,
    profile: str,
    strike: Strike,
    cluster: NetnsCluster,
    world: Path,
    calm: Callable[[], dict[int, str]],
    rows: list[RowResult],
    tmp_path: Path,
) -> None:
    cluster.mend(profile)
    trial = Trial.begin(cluster, world, tmp_path, runs=2)
    trial.wait_until_training(BEFORE)
    old = trial.node_of(trial.run_ids[0]).trainers
    at = time.time()
    strike(trial, trial.run_ids[0])
    back_at = time.time()
    trial.wait_for(
        "a first step of the next attempt",
        lambda: len(trial.state(trial.run_ids[0]).attempts) == 2 and trial.attempt(trial.run_ids[0]).started,
        180,
    )
    trial.wait_for("the old trainer's end", lambda: not any(p.is_running() for p in old), 120)
    zombie_s = max(0.0, time.time() - max(back_at, trial.attempt(trial.run_ids[0]).started.at))
    row = conclude(trial, fault, profile, calm, restarts=1, at=at, zombie_s=zombie_s)
    rows.append(row)
    assert row.holds, row


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
    assert trial.trainer_pids() == before
    row = conclude(trial, "controller killed", "fast", calm, restarts=0, detect_s=back_s)
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
    trial.wait_for("the old trainers' end", lambda: not any(p.is_running() for p in old), 120)
    row = conclude(trial, "head killed", "fast", calm, restarts=2, at=at)
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

    def trains_elsewhere() -> bool:
        state = trial.state(run_id)
        return len(state.attempts) > 1 and state.attempts[1].started is not None

    while time.time() < at + warning_s and not trains_elsewhere():
        trial.watch(POLL_S)
    node.power_off()
    trial.wait_for("a first step of the next attempt", trains_elsewhere, 120)
    row = conclude(trial, f"notice {warning_s} s", "fast", calm, restarts=1, at=at)
    rows.append(row)
    assert row.holds, row
    assert row.lost_steps == 0
    ended = trial.state(run_id).attempts[0].ended
    assert ended is not None
    assert ended.reason is EndReason.SPOT_NOTICE


def conclude(
    trial: Trial,
    fault: str,
    profile: str,
    calm: Callable[[], dict[int, str]],
    *,
    restarts: int,
    at: float | None = None,
    detect_s: float | None = None,
    zombie_s: float | None = None,
) -> RowResult:
    """Let the sweep end, and say what the fault did to its first run."""
    states = trial.finish()
    hit = states[0]
    if at is not None and len(hit.attempts) > 1:
        ended, started = hit.attempts[0].ended, hit.attempts[1].started
        detect_s = ended.at - at if ended else None
    again_s = started.at - at if at is not None and len(hit.attempts) > 1 and started else None
    made = sum(len(state.attempts) - 1 for state in states)
    return RowResult(
        fault=fault,
        profile=profile,
        recovered=trial.same_bytes(calm()),
        restarts=made,
        lost_steps=sum(trial.lost_steps()),
        detect_s=detect_s,
        again_s=again_s,
        zombie_commits=trial.zombie_commits(),
        zombie_s=zombie_s,
        needless_restarts=max(0, made - restarts),
        left_behind=len(trial.left_behind()),
    )
