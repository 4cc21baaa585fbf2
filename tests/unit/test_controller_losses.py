"""The controller on a cluster in virtual time: whatever befalls the cluster, every run ends once and well."""

import random

import pytest
from support.fake_cluster import FILE, FakeCluster, small_sweep, weights_at
from support.sweeps import R0, assert_well_ended, finish, records, state, stored_data, ticks, under_way

from orchestrator.control.cluster import Listening
from orchestrator.control.controller import Controller
from orchestrator.grid.schema import Checkpoint, Recovery
from storage import layout
from storage.memory import MemoryStore
from storage.records import EndReason, Outcome, Quarantined


def test_a_lost_node_costs_its_run_the_steps_since_the_last_commit_and_another_node_goes_on() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=1, max_steps=9)
    cluster, controller = under_way(store, sweep, 7, nodes=2, commit_every=4)
    assert cluster.busy() == ["n1/0"]

    cluster.lose_node("n1")
    finish(controller, cluster)

    assert_well_ended(store, sweep, cluster)
    attempts = state(store, R0).attempts
    assert [a.claimed.node for a in attempts] == ["n1", "n2"]
    ended = attempts[0].ended
    assert ended is not None
    assert (ended.reason, ended.step, ended.step_s, ended.detail) == (
        EndReason.NODE_LOST,
        7,
        1.0,
        "n1 was lost without notice",
    )
    assert attempts[1].resumed_from == 4


def test_a_lost_agent_is_told_from_a_lost_node() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=1)
    cluster, controller = under_way(store, sweep, 3)

    cluster.lose_agent("n1/0")
    finish(controller, cluster)

    ended = state(store, R0).attempts[0].ended
    assert ended is not None
    assert (ended.reason, ended.detail) == (EndReason.AGENT_LOST, "the agent on n1 died")


def test_silence_is_no_death_before_it_lasts_too_long() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=1, max_steps=20)
    cluster, controller = under_way(store, sweep, 3)

    cluster.silence("n1/0")
    ticks(controller, cluster, 10)
    cluster.hear("n1/0")
    finish(controller, cluster)

    assert [order.attempt for order in cluster.begun] == [1]
    assert_well_ended(store, sweep, cluster)


def test_after_too_long_a_silence_another_attempt_takes_over_and_the_ghost_is_fenced() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=1, max_steps=30)
    cluster, controller = under_way(store, sweep, 3)

    cluster.freeze("n1/0")
    ticks(controller, cluster, 17)
    assert cluster.busy() == ["n1/0", "n2/0"]
    cluster.hear("n1/0")
    cluster.advance(2)
    assert cluster.busy() == ["n2/0"], "the ghost did not notice the fence"
    finish(controller, cluster)

    ended = state(store, R0).attempts[0].ended
    assert ended is not None
    assert (ended.reason, ended.detail, ended.silent_s) == (
        EndReason.NODE_UNREACHABLE,
        "n1 did not answer for 13 s",
        11.0,  # since its last commit was seen
    )
    assert_well_ended(store, sweep, cluster)


def test_a_ghost_that_is_heard_of_again_is_asked_to_stop_at_once() -> None:
    """Its next commit would be refused, but that may be an hour away, and the slot is needed."""
    store, sweep = MemoryStore(), small_sweep(runs=1, max_steps=60)
    cluster, controller = under_way(store, sweep, 3, commit_every=50)
    cluster.silence("n1/0")
    ticks(controller, cluster, 14)
    assert cluster.busy() == ["n1/0", "n2/0"]

    cluster.hear("n1/0")
    ticks(controller, cluster, 2)

    assert cluster.busy() == ["n2/0"]
    finish(controller, cluster)
    assert_well_ended(store, sweep, cluster)


def test_time_in_which_nobody_listened_is_no_silence() -> None:
    now = 50.0
    listening = Listening(lambda: now, longest_s=2.0)
    for moment in (50.5, 51.0, 1051.0, 1051.5):
        now = moment
        listening.listen()

    assert listening.seconds == 0.5 + 0.5 + 2.0 + 0.5


@pytest.mark.parametrize("seed", range(40))
def test_a_storm_of_misfortunes_ends_with_every_result_right(seed: int) -> None:
    store = MemoryStore()
    sweep = small_sweep(
        runs=4,
        max_steps=25,
        checkpoint=Checkpoint(keep_last=2, grace_s=0.0),
        recovery=Recovery(max_failures=50, backoff_s=1.0, silence_s=6.0),
    )
    cluster = FakeCluster(store, sweep, nodes=3, commit_every=3)

    finish(Controller(sweep, store, cluster, cluster.clock), cluster, random.Random(seed))

    assert_well_ended(store, sweep, cluster)
    cluster.hear_all()
    cluster.advance(30)  # whatever nobody sees trains on until it is fenced
    assert cluster.busy() == []
    finish(Controller(sweep, store, cluster, cluster.clock), cluster)
    for run in sweep.runs:
        over = state(store, run.run_id)
        kept = [layout.committed_file(run.run_id, c, FILE) for c in over.checkpoints]
        assert stored_data(store, run.run_id) == sorted(kept), "litter"
        assert len(kept) == 2


def test_the_storms_above_are_storms() -> None:
    """Guards the test above against a cluster on which nothing goes wrong."""
    reasons: set[EndReason] = set()
    fenced = 0
    for seed in range(10):
        store, sweep = MemoryStore(), small_sweep(runs=4, max_steps=25, recovery=Recovery(max_failures=50))
        cluster = FakeCluster(store, sweep, nodes=3, commit_every=3)
        finish(Controller(sweep, store, cluster, cluster.clock), cluster, random.Random(seed))
        attempts = [a for run in sweep.runs for a in state(store, run.run_id).attempts]
        reasons |= {a.ended.reason for a in attempts if a.ended}
        fenced += sum(ghost.superseded for ghost in cluster.ghosts)
    assert reasons >= {EndReason.NODE_LOST, EndReason.AGENT_LOST, EndReason.KILLED, EndReason.DRAINED}
    assert fenced > 0


def test_a_flipped_byte_in_the_newest_checkpoint_costs_one_checkpoint() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=1, max_steps=12)
    cluster, controller = under_way(store, sweep, 6)
    newest = state(store, R0).newest
    assert newest is not None
    key = layout.committed_file(R0, newest, FILE)
    store.put(key, bytes([store.get(key)[0] ^ 1]) + store.get(key)[1:])

    cluster.lose_node("n1")
    finish(controller, cluster)

    over = state(store, R0)
    assert over.outcome is Outcome.SUCCEEDED
    assert over.result is not None
    assert store.get(layout.committed_file(R0, over.result, FILE)) == weights_at(R0, 12)
    assert [r.checkpoint.step for r in records(store, R0) if isinstance(r, Quarantined)] == [newest.step]
    assert key not in stored_data(store, R0)
