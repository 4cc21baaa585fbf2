"""The controller on a cluster in virtual time: what it starts where, and how it says so."""

from support.fake_cluster import FILE, FakeCluster, run_to_end, small_sweep
from support.sweeps import R0, R1, Counting, assert_well_ended, finish, state, stored_data, ticks, under_way

from orchestrator.control.cluster import Health, Order
from orchestrator.control.controller import Controller
from orchestrator.control.steering import AGAIN_S
from orchestrator.grid.schema import Checkpoint, Recovery
from storage import layout
from storage.memory import MemoryStore
from storage.records import Outcome


def test_a_calm_sweep_runs_each_run_once_and_keeps_what_its_policy_keeps() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=3, checkpoint=Checkpoint(keep_last=1, grace_s=0.0))
    cluster = FakeCluster(store, sweep, nodes=2)

    finish(Controller(sweep, store, cluster, cluster.clock), cluster)

    assert_well_ended(store, sweep, cluster)
    for run in sweep.runs:
        over = state(store, run.run_id)
        assert [c.step for c in over.checkpoints] == [6]
        assert over.retired == ()
        assert stored_data(store, run.run_id) == [
            layout.committed_file(run.run_id, over.checkpoints[0], FILE)
        ]
    assert [order.attempt for order in cluster.begun] == [1, 1, 1]


def test_a_busy_or_unheard_slot_is_not_free() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=2)
    cluster = FakeCluster(store, sweep, nodes=2)
    cluster.silence("n1/0")
    controller = Controller(sweep, store, cluster, cluster.clock)
    ticks(controller, cluster, 2)

    assert [slot.health for slot in cluster.observe()] == [Health.UNKNOWN, Health.ALIVE]
    assert [state(store, run.run_id).attempt for run in sweep.runs] == [1, 0]
    assert cluster.begun == [Order(run_id=R0, attempt=1, incarnation=cluster.begun[0].incarnation)]


def test_a_lost_order_is_repeated_and_starts_one_attempt() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=1)
    cluster, controller = under_way(store, sweep, 0)

    cluster.lose_orders = 3
    finish(controller, cluster)

    assert [order.attempt for order in cluster.begun] == [1]
    assert_well_ended(store, sweep, cluster)


class Overheard(FakeCluster):
    """Keeps what it is told to do."""

    told: list[str]

    def start(self, slot: str, order: Order) -> None:
        self.told.append(f"start {slot}")
        super().start(slot, order)

    def stop(self, slot: str, run_id: str, attempt: int, grace_s: float) -> None:
        self.told.append(f"stop {slot}")  # and does nothing, as one that takes its time


def test_nobody_is_told_the_same_again_before_it_had_time_to_do_it() -> None:
    store, sweep = Counting(), small_sweep(runs=20, max_steps=600)
    cluster = Overheard(store, sweep, nodes=20, commit_every=500)
    cluster.told = []
    controller = Controller(sweep, store, cluster, cluster.clock)
    cluster.lose_orders = 20
    controller.tick()
    assert len(cluster.told) == 20
    store.take()

    for _ in range(10):
        controller.tick()
    assert len(cluster.told) == 20, "the orders are on their way"
    assert store.take() == []
    cluster.now += AGAIN_S
    for _ in range(10):
        controller.tick()
    assert len(cluster.told) == 40, "or were lost"
    assert store.take() == sorted(f"list {layout.run_log_prefix(run.run_id)}" for run in sweep.runs)

    ticks(controller, cluster, 3)
    cluster.told.clear()
    controller.cancel(run.run_id for run in sweep.runs)
    for _ in range(10):
        controller.tick()
    assert sorted(cluster.told) == sorted(f"stop {slot}" for slot in cluster.busy())
    cluster.now += AGAIN_S
    controller.tick()
    assert len(cluster.told) == 40


def test_a_trainer_that_stalls_is_tried_again_elsewhere_after_a_wait_and_fails_in_the_end() -> None:
    store = MemoryStore()
    sweep = small_sweep(runs=1, recovery=Recovery(max_failures=3, backoff_s=4.0, max_backoff_s=60.0))
    cluster, controller = under_way(store, sweep, 0, nodes=2, commit_every=5)

    for number, _ in enumerate(run_to_end(controller, cluster)):
        for slot in cluster.busy():
            cluster.exit(slot, 1, error=f"ValueError: {number}")

    over = state(store, R0)
    assert over.outcome is Outcome.FAILED
    assert [a.claimed.node for a in over.attempts] == ["n1", "n2", "n1"]
    ends = [a.ended.at for a in over.attempts if a.ended]
    starts = [a.claimed.at for a in over.attempts]
    assert [start - end for start, end in zip(starts[1:], ends, strict=False)] == [4.0, 8.0]
    assert over.finished is not None
    assert over.finished.detail.endswith("no new checkpoint in 3 attempts (step 0)")


def test_one_run_that_fails_does_not_keep_the_others_from_succeeding() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=2)
    cluster, controller = under_way(store, sweep, 2, nodes=1)

    cluster.exit("n1/0", 78, error="BadInput: no images")
    finish(controller, cluster)

    assert (state(store, R0).outcome, state(store, R1).outcome) == (Outcome.FAILED, Outcome.SUCCEEDED)
    assert controller.states[R0].finished == state(store, R0).finished
