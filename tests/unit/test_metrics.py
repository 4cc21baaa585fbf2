"""What is counted, and under which labels. What Ray makes of it, an e2e test reads from Ray itself."""

from dataclasses import dataclass, field
from typing import Any

import pytest
from support.fake_cluster import FakeCluster, small_sweep

from orchestrator.control.controller import Controller
from orchestrator.control.placing import SlotNote, Standing
from orchestrator.notices.notice import Kind
from orchestrator.on_ray import metrics
from orchestrator.on_ray.metrics import RUN_LABELS, AgentMetrics, ControllerMetrics, has_label
from storage.memory import MemoryStore
from trainer.supervisor import Storing

Told = dict[tuple[str, tuple[str, ...]], float]


@dataclass
class Recorder:
    """Takes the place of Ray's exporter, which needs a cluster."""

    told: Told = field(default_factory=dict)

    def of(self, name: str) -> dict[tuple[str, ...], float]:
        return {labels: value for (metric, labels), value in self.told.items() if metric == name}


class _Metric:
    def __init__(self, recorder: Recorder, name: str, *about: Any, **more: Any) -> None:
        self._recorder, self._name = recorder, name

    def _key(self, tags: dict[str, str]) -> tuple[str, tuple[str, ...]]:
        return self._name, tuple(str(value) for value in tags.values())

    def set(self, value: float, tags: dict[str, str]) -> None:
        self._recorder.told[self._key(tags)] = value

    def inc(self, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
        key = self._key(tags or {})
        self._recorder.told[key] = self._recorder.told.get(key, 0.0) + value

    observe = set


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(metrics, kind, lambda *a, **m: _Metric(recorder, *a, **m))
    return recorder


def test_only_the_first_runs_of_a_sweep_have_series_of_their_own(recorder: Recorder) -> None:
    agent = AgentMetrics("my-cat-2")
    runs = [f"my-cat-2-{index}-{index:08x}" for index in range(RUN_LABELS + 300)]
    for run_id in runs:
        agent.attempt_started()
        agent.stepped(run_id, 10, 0, 0.5)
        agent.stored(run_id, Storing(commits=1, committed_at=1.0))

    for name in ("orch_run_step", "orch_run_loss", "orch_upload_queue", "orch_last_commit_timestamp"):
        assert sorted(recorder.of(name)) == sorted(("my-cat-2", run_id) for run_id in runs[:RUN_LABELS])
    assert recorder.of("orch_steps_total") == {("my-cat-2",): 10.0 * len(runs)}, "all count together"
    assert not has_label("whatever")


def slot(node: str, number: int, *, let_off: bool, standing: Standing = Standing.BARRED) -> SlotNote:
    name = f"{node}/{number}"
    return SlotNote(slot=name, node=node, up_since=0.0, standing=standing, let_off=let_off)


def test_a_notice_that_is_taken_back_is_a_false_one_once(recorder: Recorder) -> None:
    controller = ControllerMetrics("cat")

    def observed(*notes: SlotNote) -> float:
        controller.observe({}, notes, 0.0)
        return recorder.of("orch_notice_total").get(("cat", "false"), 0.0)

    old, gone = slot("old", 0, let_off=True), slot("gone", 0, let_off=True, standing=Standing.GONE)
    assert observed(old) == 0.0, "an earlier controller has counted it"
    assert observed(old, gone, slot("a", 0, let_off=False)) == 0.0
    assert observed(old, slot("a", 0, let_off=True), slot("a", 1, let_off=True)) == 1.0
    assert observed(slot("a", 0, let_off=True)) == 1.0
    assert observed(slot("a", 0, let_off=False)) == 1.0
    assert observed(slot("a", 0, let_off=True)) == 2.0


def test_what_the_time_of_attempts_costs_is_told_where_the_price_is_known(recorder: Recorder) -> None:
    store, sweep = MemoryStore(), small_sweep(runs=2, max_steps=20)
    cluster = FakeCluster(store, sweep, nodes=2)
    controller = Controller(sweep, store, cluster, cluster.clock)
    controller.tick()
    begun = {run_id: state.attempts[0].claimed.at for run_id, state in controller.states.items()}
    now = max(begun.values()) + 1800.0

    ControllerMetrics("cat").observe(controller.states, controller.notes(), now)
    assert recorder.of("orch_spend_usd") == {}
    ControllerMetrics("cat", 0.4).observe(controller.states, controller.notes(), now)
    hours = sum(now - at for at in begun.values()) / 3600.0
    assert recorder.of("orch_spend_usd") == {("cat",): pytest.approx(0.4 * hours)}


def test_a_withdrawn_notice_is_noted_at_its_slots() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=1)
    cluster = FakeCluster(store, sweep, nodes=2)
    controller = Controller(sweep, store, cluster, cluster.clock)

    def let_off() -> list[bool]:
        controller.tick()
        return [note.let_off for note in controller.notes()]

    assert let_off() == [False, False]
    cluster.warn("n1")
    assert let_off() == [False, False]
    cluster.withdraw("n1")
    assert let_off() == [True, False]

    cluster.lift_notices()
    cluster.warn("n2", kind=Kind.REBALANCE)
    cluster.withdraw("n2")
    assert let_off() == [False, False], "that was none of its end"
