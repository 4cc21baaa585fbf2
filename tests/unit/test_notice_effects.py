"""What follows from a notice: an attempt saves itself, its run goes on elsewhere at once, none comes here."""

from dataclasses import replace

import pytest
from support.fake_cluster import FakeCluster, run_to_end, small_sweep, weights_at
from support.runs import claimed, committed, state_after

from orchestrator.control.cluster import Health, Slot
from orchestrator.control.controller import Controller
from orchestrator.control.lifecycle import Exited, Policy, advance
from orchestrator.control.loss import OVERDUE_SILENCE_S, loss
from orchestrator.grid.schema import Recovery, Resources
from orchestrator.notices.notice import CALM_S, SOON_S, Kind, Notice
from orchestrator.on_ray.ray_drain import drain, draining
from orchestrator.reports.why import why
from storage import layout
from storage.log import run_log
from storage.memory import MemoryStore
from storage.records import Ended, EndReason, Outcome, Started
from storage.run_state import RunState
from trainer.rundir import EXIT_PREEMPTED

R0 = "cat-0-00000000"
STEPS = 40


class World:
    """One sweep, a controller, and time."""

    def __init__(
        self, *, nodes: int, runs: int = 1, silence_s: float = 60.0, max_concurrent: int | None = None
    ) -> None:
        self.store = MemoryStore()
        recovery = Recovery(backoff_s=2.0, silence_s=silence_s)
        sweep = small_sweep(runs=runs, max_steps=STEPS, recovery=recovery)
        resources = Resources(max_concurrent=max_concurrent)
        self.sweep = sweep.model_copy(update={"resources": resources})
        self.cluster = FakeCluster(self.store, self.sweep, nodes=nodes, commit_every=7)
        self.controller = Controller(self.sweep, self.store, self.cluster, clock=self.cluster.clock)

    def pass_time(self, seconds: int) -> None:
        for _ in range(seconds):
            self.controller.tick()
            self.cluster.advance()

    def to_the_end(self) -> None:
        for _ in run_to_end(self.controller, self.cluster):
            pass
        for plan in self.sweep.runs:
            state = self.state(plan.run_id)
            assert state.outcome is Outcome.SUCCEEDED
            assert state.result is not None
            key = layout.committed_file(plan.run_id, state.result, "adapter.safetensors")
            assert self.store.get(key) == weights_at(plan.run_id, STEPS)

    def state(self, run_id: str = R0) -> RunState:
        return run_log(self.store, run_id).refresh()

    def nodes(self, run_id: str = R0) -> list[str]:
        return [attempt.claimed.node for attempt in self.state(run_id).attempts]


def test_a_noticed_run_goes_on_elsewhere_at_once_and_loses_nothing() -> None:
    world = World(nodes=2)
    world.pass_time(12)
    (first,) = world.nodes()
    world.cluster.warn(first, 30.0)
    world.pass_time(4)
    state = world.state()

    assert state.attempts[0].ended is not None
    assert state.attempts[0].ended.reason is EndReason.SPOT_NOTICE
    assert state.attempts[0].ended.detail == "spot notice from AWS, 30 s warning"
    assert state.attempts[0].ended.step == state.attempts[1].resumed_from
    assert state.attempts[1].started is not None, "the replacement waits for the node to be gone"
    assert state.attempts[1].claimed.node != first
    world.cluster.lose_node(first)
    world.to_the_end()
    assert len(world.nodes()) == 2


def test_nothing_is_placed_on_a_node_that_was_told_of_its_end() -> None:
    world = World(nodes=2, runs=4)
    world.pass_time(6)
    world.cluster.warn("n1", None)
    world.pass_time(3)
    warned_at = world.cluster.now
    world.to_the_end()

    attempts = [attempt for plan in world.sweep.runs for attempt in world.state(plan.run_id).attempts]
    later = [attempt.claimed.node for attempt in attempts if attempt.claimed.at >= warned_at]
    assert len(later) >= 2
    assert set(later) == {"n2"}


def test_an_order_that_is_on_its_way_when_the_notice_comes_ends_as_one() -> None:
    world = World(nodes=1)
    world.controller.tick()
    world.cluster.warn("n1")
    world.cluster.advance(2)
    world.controller.tick()
    (attempt,) = world.state().attempts
    assert attempt.ended is not None
    assert attempt.ended.reason is EndReason.SPOT_NOTICE


def test_a_withdrawn_notice_costs_one_restart_however_it_flaps() -> None:
    world = World(nodes=1)
    world.pass_time(8)
    for _ in range(3):
        world.cluster.warn("n1", 120.0)
        world.pass_time(4)
        world.cluster.withdraw("n1")
        world.pass_time(4)
    assert len(world.nodes()) == 1, "it went back to a node that cannot make up its mind"
    waited_from = world.cluster.now
    world.to_the_end()

    assert len(world.nodes()) == 2
    second = world.state().attempts[1].claimed.at
    assert second - waited_from >= CALM_S - 4


def test_a_node_that_ends_later_gets_nothing_new() -> None:
    world = World(nodes=2, runs=2)
    world.cluster.warn("n2", 3600.0)
    world.to_the_end()
    assert (world.nodes(R0), world.nodes("cat-1-00000001")) == (["n1"], ["n1"])


def test_a_node_that_ends_later_trains_on_until_that_is_soon() -> None:
    world = World(nodes=2)
    world.pass_time(8)
    assert world.nodes() == ["n1"]
    world.cluster.warn("n1", SOON_S + 12.0)
    world.pass_time(10)
    assert world.state().attempts[0].ended is None, "it was stopped long before the end of its node"
    world.pass_time(8)
    (first, second) = world.state().attempts
    assert first.ended is not None
    assert (first.ended.reason, first.ended.step) == (EndReason.SPOT_NOTICE, second.resumed_from)
    world.to_the_end()
    assert world.nodes() == ["n1", "n2"]


def test_a_notice_for_later_that_is_withdrawn_costs_nothing() -> None:
    world = World(nodes=2)
    world.pass_time(8)
    for _ in range(3):
        world.cluster.warn("n1", 3600.0)
        world.pass_time(2)
        world.cluster.withdraw("n1")
        world.pass_time(2)
    world.to_the_end()
    assert world.nodes() == ["n1"]


def test_a_withdrawn_notice_costs_one_restart_where_there_are_other_nodes() -> None:
    world = World(nodes=2)
    world.pass_time(8)
    for _ in range(3):
        world.cluster.warn("n1", 120.0)
        world.pass_time(3)
        world.cluster.withdraw("n1")
        world.pass_time(3)
    world.to_the_end()
    assert world.nodes() == ["n1", "n2"]


def test_a_node_that_goes_before_the_attempt_has_ended_was_told_of_it() -> None:
    world = World(nodes=2)
    world.pass_time(8)
    (first,) = world.nodes()
    world.cluster.warn(first, 1.0)
    world.cluster.lose_node(first)
    world.to_the_end()
    ended = world.state().attempts[0].ended
    assert ended is not None
    assert (ended.reason, ended.detail) == (EndReason.SPOT_NOTICE, "spot notice from AWS, 1 s warning")


def test_who_is_silent_after_the_end_that_was_told_is_gone() -> None:
    world = World(nodes=2, silence_s=600.0)
    world.pass_time(8)
    (first,) = world.nodes()
    world.cluster.warn(first, 5.0)
    world.cluster.freeze(f"{first}/0")
    world.pass_time(5 + int(OVERDUE_SILENCE_S) + 3)
    assert len(world.nodes()) == 2
    world.to_the_end()


def test_a_node_with_a_rebalance_notice_is_the_last_choice_and_no_worse() -> None:
    world = World(nodes=2, runs=2)
    world.cluster.warn("n1", None, Kind.REBALANCE)
    world.pass_time(2)
    assert (world.nodes(R0), world.nodes("cat-1-00000001")) == (["n2"], ["n1"])
    world.to_the_end()
    assert (world.nodes(R0), world.nodes("cat-1-00000001")) == (["n2"], ["n1"])


def test_no_more_runs_train_than_are_asked_for_although_there_are_more_slots() -> None:
    world = World(nodes=2, runs=2, max_concurrent=1)
    world.pass_time(8)
    assert len(world.cluster.busy()) == 1
    (slot,) = world.cluster.busy()
    world.cluster.warn(slot.split("/")[0])
    world.pass_time(4)
    assert len(world.cluster.busy()) == 1
    assert world.cluster.busy() != [slot]
    world.to_the_end()


NOTICE = Notice(kind=Kind.TERMINATE, source="AWS", left_s=20.0, warning_s=118.0)
WITHDRAWN = replace(NOTICE, withdrawn=True)
LATER = replace(NOTICE, left_s=3600.0)
SAID = "spot notice from AWS, 118 s warning"


def slot(health: Health, **facts: object) -> Slot:
    return Slot(slot="n1/0", node="n1", up_since=0.0, health=health, **facts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("slot", "silent_s", "expected"),
    [
        (slot(Health.ALIVE, notice=NOTICE), 0.0, None),
        (slot(Health.GONE, node_lost=True), 0.0, (EndReason.NODE_LOST, "n1 was lost without notice")),
        (slot(Health.GONE), 0.0, (EndReason.AGENT_LOST, "the agent on n1 died")),
        (slot(Health.GONE, notice=NOTICE), 0.0, (EndReason.SPOT_NOTICE, SAID)),
        (slot(Health.GONE, preempted=True), 0.0, (EndReason.SPOT_NOTICE, "spot notice from Ray")),
        (slot(Health.GONE, notice=LATER), 0.0, (EndReason.AGENT_LOST, "the agent on n1 died")),
        (
            slot(Health.GONE, notice=WITHDRAWN, preempted=True),
            0.0,
            (EndReason.AGENT_LOST, "the agent on n1 died"),
        ),
        (
            slot(Health.GONE, notice=WITHDRAWN, preempted=True, node_lost=True),
            0.0,
            (EndReason.SPOT_NOTICE, "spot notice from Ray"),
        ),
        (
            slot(Health.GONE, notice=NOTICE, preempted=True, out_of_memory=True),
            0.0,
            (EndReason.OOM_HOST, "n1 ran out of memory, and Ray ended the agent for that"),
        ),
        (
            slot(Health.GONE, node_lost=True, notice=Notice(kind=Kind.REBALANCE, source="AWS")),
            0.0,
            (EndReason.NODE_LOST, "n1 was lost without notice"),
        ),
        (slot(Health.UNKNOWN, notice=NOTICE), 50.0, None),
        (
            slot(
                Health.UNKNOWN, notice=Notice(kind=Kind.TERMINATE, source="AWS", left_s=-1.0, warning_s=118.0)
            ),
            OVERDUE_SILENCE_S + 1,
            (EndReason.SPOT_NOTICE, SAID),
        ),
        (
            slot(Health.UNKNOWN, silent_s=91.0),
            91.0,
            (EndReason.NODE_UNREACHABLE, "n1 did not answer for 91 s"),
        ),
    ],
)
def test_what_a_lost_slot_means(slot: Slot, silent_s: float, expected: tuple[EndReason, str] | None) -> None:
    assert loss(slot, silent_s, 90.0) == expected


def test_a_drained_node_that_goes_was_drained() -> None:
    gone = slot(Health.GONE, node_lost=True, preempted=True)
    assert loss(gone, 0.0, 90.0, drained=True) == (EndReason.DRAINED, "n1 is drained, and gone")


@pytest.mark.parametrize("code", [EXIT_PREEMPTED, -9])
def test_an_attempt_that_was_stopped_for_a_notice_says_so(code: int) -> None:
    event = Exited(at=60.0, attempt=1, code=code, step=7, notice=SAID, saved_s=6.125)
    (ended,) = advance(state_after(claimed(1)), event, Policy())
    assert ended == Ended(
        attempt=1, reason=EndReason.SPOT_NOTICE, detail=SAID, step=7, exit_code=code, saved_s=6.125, at=60.0
    )


def test_a_crash_is_not_excused_by_a_notice() -> None:
    event = Exited(at=60.0, attempt=1, code=1, error="ValueError: no", notice=SAID)
    (ended,) = advance(state_after(claimed(1)), event, Policy())
    assert isinstance(ended, Ended)
    assert ended.reason is EndReason.APP_ERROR


def test_why_tells_the_warning_and_what_was_saved() -> None:
    ended = Ended(
        attempt=1, reason=EndReason.SPOT_NOTICE, detail=SAID, step=1240, step_s=0.5, saved_s=6.125, at=60.0
    )
    state = state_after(
        claimed(1),
        Started(attempt=1, step=0, at=10.0),
        committed(1240, 1),
        ended,
        claimed(2),
        Started(attempt=2, step=1240, at=82.0),
    )
    node = state.attempts[0].claimed.node
    assert why(state, 1500, at=lambda seconds: "14:02").splitlines()[1] == (
        f"14:02 spot notice on {node} (AWS, 118 s warning): saved step 1240 in 6.1 s, lost 0 steps; "
        "22.0 s to be training again."
    )


def test_a_ray_that_cannot_drain_costs_a_word_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    assert not drain(
        "f" * 56, "spot notice from AWS", 120.0
    )  # no cluster is connected, so nothing is as it was
    assert draining() == frozenset()
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "node ffffffff is not drained in Ray"
    ]
