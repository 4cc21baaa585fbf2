"""The controller dies, loses a reply, or meets a second one, at each of its calls to the store, one by one.

The sweep is small and loses a node, so its log has every kind of record that a controller writes.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from support.fake_cluster import FILE, FakeCluster, small_sweep, weights_at
from support.flaky_store import Died, Fault, FlakyStore

from orchestrator.control.controller import Controller
from orchestrator.grid.schema import Checkpoint, Recovery
from orchestrator.grid.sweep import Sweep
from storage import layout
from storage.log import run_log
from storage.memory import MemoryStore
from storage.object_store import ObjectInfo, ObjectStore
from storage.records import Finished, Outcome
from storage.run_state import RunState

NODE_LOST_AT = 1005.0
NEVER = 0


class World:
    """A store, a sweep of two runs and a cluster that loses its first node after five seconds."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.sweep: Sweep = small_sweep(
            runs=2,
            max_steps=6,
            checkpoint=Checkpoint(keep_last=1, grace_s=0.0),
            recovery=Recovery(silence_s=10.0),
        )
        self.cluster = FakeCluster(self.store, self.sweep, nodes=2)

    def controller(self, store: ObjectStore | None = None) -> Controller:
        return Controller(self.sweep, store or self.store, self.cluster, self.cluster.clock)

    def live(self, *controllers: Controller) -> None:
        """Let controllers tick in turn until all are done, or one dies."""
        for _ in range(300):
            for controller in controllers:
                controller.tick()
            if all(controller.done for controller in controllers):
                return
            self.cluster.advance()
            if self.cluster.now == NODE_LOST_AT:
                self.cluster.lose_node("n1")
        raise AssertionError(f"not done: {controllers[0].states}")

    def check(self, attempts: int = 2) -> None:
        """Every run succeeded once, with the right bytes, and nothing but its result is left."""
        begun = [(order.run_id, order.attempt) for order in self.cluster.begun]
        assert len(begun) == len(set(begun)), "an attempt was started twice"
        assert sorted(begun) == [
            (run.run_id, n) for run in self.sweep.runs for n in range(1, self.state(run.run_id).attempt + 1)
        ], "an attempt was claimed and never started"
        assert sum(self.state(run.run_id).attempt for run in self.sweep.runs) <= 2 + attempts
        for run in self.sweep.runs:
            log = run_log(self.store, run.run_id)
            over = log.refresh()
            results = [e.record for e in log.entries() if isinstance(e.record, Finished)]
            assert [result.outcome for result in results] == [Outcome.SUCCEEDED]
            assert over.result is not None
            key = layout.committed_file(run.run_id, over.result, FILE)
            assert self.store.get(key) == weights_at(run.run_id, 6)
            assert [info.key for info in self.store.list(layout.data_prefix(run.run_id))] == [key]
            assert over.retired == ()

    def state(self, run_id: str) -> RunState:
        return run_log(self.store, run_id).refresh()


def calls_of_an_undisturbed_controller() -> int:
    world = World()
    counting = FlakyStore(world.store, NEVER, Fault.REFUSE)
    world.live(world.controller(counting))
    world.check(attempts=1)
    return counting.calls


CALLS = calls_of_an_undisturbed_controller()


def test_the_walk_covers_what_a_controller_writes() -> None:
    world = World()
    world.live(world.controller())
    kinds = set()
    for run in world.sweep.runs:
        log = run_log(world.store, run.run_id)
        log.refresh()
        kinds |= {entry.record.kind for entry in log.entries()}

    assert kinds >= {"claimed", "ended", "retired", "reaped", "finished"}
    assert CALLS >= 40


@pytest.mark.parametrize("fault", [Fault.DIE_BEFORE, Fault.DIE_AFTER, Fault.DIE_HALF_WAY])
def test_a_controller_that_dies_at_any_call_is_succeeded_by_one_that_finishes(fault: Fault) -> None:
    died = 0
    for at in range(1, CALLS + 1):
        world = World()
        try:
            world.live(world.controller(FlakyStore(world.store, at, fault)))
        except Died:
            died += 1
            world.live(world.controller())
        world.check()
    assert died == CALLS


def test_a_controller_that_dies_between_any_two_calls_while_its_cluster_goes_on_is_succeeded() -> None:
    """The trainers go on for four seconds that nobody looks at."""
    for at in range(1, CALLS + 1, 3):
        world = World()
        with pytest.raises(Died):
            world.live(world.controller(FlakyStore(world.store, at, Fault.DIE_AFTER)))
        for _ in range(4):
            world.cluster.advance()
            if world.cluster.now == NODE_LOST_AT:
                world.cluster.lose_node("n1")
        world.live(world.controller())
        world.check()


@pytest.mark.parametrize("fault", [Fault.LOSE_REPLY, Fault.REFUSE])
def test_one_call_without_an_answer_changes_nothing_but_the_time(
    fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.log.PAUSES_S", (0.0,) * 4)
    for at in range(1, CALLS + 1):
        world = World()
        world.live(world.controller(FlakyStore(world.store, at, fault)))
        world.check()


class Interrupted:
    """A store that lets something happen just before its n-th call, counted from 1."""

    def __init__(self, inner: ObjectStore, at: int, what: Callable[[], object]) -> None:
        self._inner = inner
        self._at = at
        self._what = what
        self.calls = 0

    @property
    def url(self) -> str:
        return self._inner.url

    def put(self, key: str, body: bytes | Path) -> None:
        self._count()
        self._inner.put(key, body)

    def create(self, key: str, body: bytes) -> bool:
        self._count()
        return self._inner.create(key, body)

    def get(self, key: str) -> bytes:
        self._count()
        return self._inner.get(key)

    def download(self, key: str, target: Path) -> None:
        self._count()
        self._inner.download(key, target)

    def head(self, key: str) -> ObjectInfo | None:
        self._count()
        return self._inner.head(key)

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        self._count()
        return self._inner.list(prefix, after)

    def delete(self, keys: Iterable[str]) -> None:
        self._count()
        self._inner.delete(keys)

    def abort_uploads(self, prefix: str) -> int:
        self._count()
        return self._inner.abort_uploads(prefix)

    def _count(self) -> None:
        self.calls += 1
        if self.calls == self._at:
            self._what()


def test_two_controllers_that_tick_in_turn_do_no_harm() -> None:
    world = World()
    world.live(world.controller(), world.controller())
    world.check()


def test_a_second_controller_that_ticks_within_any_call_of_the_first_does_no_harm() -> None:
    for at in range(1, CALLS + 1):
        world = World()
        second = world.controller()
        first = world.controller(Interrupted(world.store, at, second.tick))
        world.live(first)
        world.live(second)
        world.check()


def test_a_trainer_that_commits_within_any_call_of_the_controller_is_not_lost() -> None:
    """Time passes in the middle of a tick: what was observed is old when it is acted on."""
    for at in range(1, CALLS + 1):
        world = World()
        world.live(world.controller(Interrupted(world.store, at, world.cluster.advance)))
        world.check()


def test_a_run_that_completes_within_any_call_of_a_controller_that_gives_it_up_has_succeeded() -> None:
    """The cluster takes its node for dead and a person cancels it, while it makes its last steps unseen."""
    completed = 0
    for at in range(1, CALLS + 1):
        world = World()
        run_id = world.sweep.runs[0].run_id
        asking = world.controller()
        for _ in range(3):
            asking.tick()
            world.cluster.advance()
        asking.cancel([run_id])
        world.cluster.lose_node("n1", ghosts=True)
        world.live(world.controller(Interrupted(world.store, at, lambda c=world.cluster: c.advance(6))))

        over = world.state(run_id)
        completed += over.result is not None
        assert over.outcome is (Outcome.SUCCEEDED if over.result else Outcome.CANCELLED)
    assert 0 < completed < CALLS


def test_a_cancel_within_any_call_of_the_controller_ends_the_run() -> None:
    for at in range(1, CALLS + 1):
        world = World()
        run_id = world.sweep.runs[0].run_id
        asking = world.controller()
        world.live(world.controller(Interrupted(world.store, at, lambda c=asking, r=run_id: c.cancel([r]))))

        over = world.state(run_id)
        assert over.finished is not None
        assert over.outcome is (Outcome.SUCCEEDED if over.result else Outcome.CANCELLED)
        assert world.cluster.busy() == []
