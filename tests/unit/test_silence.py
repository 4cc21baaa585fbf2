"""Silence is not death: who commits is alive, and only a death report or the limit starts a replacement."""

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_cluster import FakeCluster, run_to_end, small_sweep

from orchestrator.control import silence
from orchestrator.control.controller import REFRESH_S, Controller
from orchestrator.grid.schema import Recovery
from orchestrator.grid.sweep import Sweep
from storage.log import run_log
from storage.memory import MemoryStore
from storage.object_store import ObjectInfo
from storage.records import Claimed, Committed, Ended, EndReason, Outcome, Record, Started
from storage.run_state import RunState, apply

RUN = "cat-0-00000000"
LIMIT_S = 10.0


def world(max_steps: int = 60, commit_every: int = 2) -> tuple[MemoryStore, Sweep, FakeCluster, Controller]:
    store = MemoryStore()
    sweep = small_sweep(runs=1, max_steps=max_steps, recovery=Recovery(backoff_s=2.0, silence_s=LIMIT_S))
    cluster = FakeCluster(store, sweep, commit_every=commit_every)
    return store, sweep, cluster, Controller(sweep, store, cluster, cluster.clock)


def ticks(controller: Controller, cluster: FakeCluster, number: int) -> None:
    for _ in range(number):
        controller.tick()
        cluster.advance()


def history(store: MemoryStore) -> list[Record]:
    log = run_log(store, RUN)
    log.refresh()
    return [entry.record for entry in log.entries()]


def test_a_run_that_commits_is_not_replaced_however_long_its_agent_is_silent() -> None:
    store, _, cluster, controller = world(max_steps=60)
    ticks(controller, cluster, 3)

    cluster.silence("n1/0")
    ticks(controller, cluster, 50)

    assert [order.attempt for order in cluster.begun] == [1]
    for _ in run_to_end(controller, cluster):
        pass
    assert run_log(store, RUN).refresh().outcome is Outcome.SUCCEEDED
    assert [order.attempt for order in cluster.begun] == [1], "its result was there: nobody else had to train"


def test_a_run_whose_commits_stop_is_replaced_once_the_limit_has_passed_since_the_last() -> None:
    store, _, cluster, controller = world()
    ticks(controller, cluster, 3)
    cluster.silence("n1/0")
    ticks(controller, cluster, 20)
    last_commit_at = max(r.at for r in history(store) if isinstance(r, Committed))

    cluster.freeze("n1/0")
    ticks(controller, cluster, int(LIMIT_S + REFRESH_S) + 2)

    (ended,) = [record for record in history(store) if isinstance(record, Ended)]
    assert ended.reason is EndReason.NODE_UNREACHABLE
    assert LIMIT_S < ended.at - last_commit_at <= LIMIT_S + REFRESH_S + 2
    assert LIMIT_S < ended.silent_s <= LIMIT_S + 2
    assert ended.step == run_log(store, RUN).refresh().attempts[1].resumed_from


class SlowToRead(MemoryStore):
    """Time passes, for everybody, while the controller reads the log of ``slow``."""

    slow = ""
    cluster: FakeCluster | None = None

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        if self.slow and self.slow in prefix and self.cluster:
            self.slow, slow = "", self.slow
            self.cluster.advance(4)
            self.slow = slow
        return super().list(prefix, after)


@pytest.mark.parametrize("seconds", range(12, 20))
def test_a_run_is_not_found_silent_for_how_long_another_ones_log_took_to_read(seconds: int) -> None:
    store = SlowToRead()
    recovery = Recovery(backoff_s=2.0, silence_s=LIMIT_S)
    sweep = small_sweep(runs=2, max_steps=120, recovery=recovery)
    cluster = FakeCluster(store, sweep, commit_every=8)
    controller = Controller(sweep, store, cluster, cluster.clock)
    store.cluster, other = cluster, sweep.runs[1].run_id
    ticks(controller, cluster, 3)
    cluster.silence("n1/0")
    ticks(controller, cluster, seconds)

    cluster.exit("n2/0", 1, "boom")  # so that this log is read now, whether or not the other one is
    store.slow = other
    controller.tick()

    assert controller.states[other].attempts[0].ended is not None, "its end was seen"
    assert controller.states[RUN].attempts[0].ended is None


def test_a_controller_that_starts_while_a_slot_is_silent_waits_the_limit_out_itself() -> None:
    store, sweep, cluster, controller = world()
    ticks(controller, cluster, 5)
    cluster.silence("n1/0")
    ticks(controller, cluster, 2)

    ticks(Controller(sweep, store, cluster, cluster.clock), cluster, 30)

    assert [order.attempt for order in cluster.begun] == [1]


def test_a_death_report_is_believed_at_once_though_a_commit_is_fresh() -> None:
    _, _, cluster, controller = world()
    ticks(controller, cluster, 4)

    cluster.lose_node("n1", ghosts=True)
    ticks(controller, cluster, 2)

    assert [order.attempt for order in cluster.begun] == [1, 2]


MOMENTS = st.lists(
    st.tuples(st.sampled_from(["silence", "freeze", "hear", "lose"]), st.integers(1, 25)), max_size=8
)


@settings(max_examples=30, deadline=None)
@given(moments=MOMENTS, commit_every=st.integers(1, 12))
def test_no_attempt_is_replaced_while_it_is_alive_and_no_two_ever_count(
    moments: list[tuple[str, int]], commit_every: int
) -> None:
    store, _, cluster, controller = world(max_steps=80, commit_every=commit_every)
    ticks(controller, cluster, 2)
    for what, seconds in moments:
        slots = cluster.busy()
        if slots:
            slot = slots[-1]
            match what:
                case "silence":
                    cluster.silence(slot)
                case "freeze":
                    cluster.freeze(slot)
                case "hear":
                    cluster.hear_all()
                case "lose":
                    cluster.lose_node(slot.split("/")[0], ghosts=True)
                    cluster.add_node()
        ticks(controller, cluster, seconds)
    cluster.hear_all()
    for _ in run_to_end(controller, cluster):
        pass
    cluster.hear_all()
    cluster.advance(100)
    assert cluster.busy() == []
    assert not [ghost for ghost in cluster.ghosts if ghost.exit_code is None], "a zombie trains on"

    state = RunState()
    own: list[tuple[int, float]] = []
    for record in history(store):
        if isinstance(record, Claimed | Started | Committed):
            assert record.attempt == state.attempt + isinstance(record, Claimed), "a fenced record counts"
            own.append((record.attempt, record.at))
        if isinstance(record, Ended):
            assert record.reason in (EndReason.NODE_LOST, EndReason.NODE_UNREACHABLE, EndReason.KILLED), (
                record
            )
            if record.reason is EndReason.NODE_UNREACHABLE:
                last = max(at for attempt, at in own if attempt == record.attempt)
                assert record.at - last > LIMIT_S, "it was alive"
        state = apply(state, record)
    assert state.outcome is Outcome.SUCCEEDED


def test_what_was_there_at_the_first_look_is_no_sign_of_life() -> None:
    claimed = Claimed(attempt=1, incarnation="00000000", node="n", slot="s", at=0.0)
    state = apply(RunState(), claimed)
    grown = apply(state, Started(attempt=1, step=0, at=5.0))

    first = silence.look(None, grown, now=100.0)
    again = silence.look(first, grown, now=110.0)
    assert silence.silent_s(30.0, first, 100.0) == silence.silent_s(30.0, again, 110.0) == 30.0

    later = silence.look(silence.look(None, state, now=100.0), grown, now=110.0)
    assert silence.silent_s(30.0, later, 112.0) == 2.0
    assert silence.look(later, grown, now=120.0) == later
    assert silence.look(later, apply(grown, Ended(attempt=1, reason=EndReason.KILLED, at=6.0)), 121.0) is None
