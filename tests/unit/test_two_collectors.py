"""Two that clean up one run at the same time, and trainers that commit meanwhile: at every call, one by one.

A record that another's made pointless is refused as fenced; that is no failure, and nothing is lost by it.
"""

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import TypeVar

import pytest
from support.flaky_store import Died, Fault, FlakyStore
from support.invariants import Told, Witnessed, leftovers, violations
from support.runs import RUN, claimed, ended, finished, incarnation, write_checkpoint

from storage import layout
from storage.checkpoints import CheckpointStore
from storage.errors import Fenced
from storage.garbage.collecting import collect_run
from storage.garbage.inventory import RunObjects, take
from storage.garbage.rules import Keep, plan_run
from storage.log import run_log
from storage.memory import MemoryStore
from storage.object_store import ObjectStore
from storage.retention import plan_prune

T = TypeVar("T")
NEVER = 0


class Interrupted(FlakyStore):
    """Lets something happen just before its n-th call."""

    def __init__(self, inner: ObjectStore, at: int, what: Callable[[], object]) -> None:
        super().__init__(inner, NEVER, Fault.REFUSE)
        self._now = at
        self._what = what

    def _call(self, effect: Callable[[], T], half: Callable[[], object] = lambda: None) -> T:
        if self.calls + 1 == self._now:
            self._what()
        return super()._call(effect, half)


class World:
    """A run of which attempt 1 left orphans, and attempt 2, which has committed steps 10 to 40, runs."""

    def __init__(self, disk: Path) -> None:
        self.store = MemoryStore()
        self.disk = disk
        self.told = Told()
        ledger = self.ledger(self.store)
        ledger.append(claimed(1))
        self.store.put(layout.checkpoint_file(RUN, 1, incarnation(1), 10, "half"), b"of an upload")
        ledger.append(ended(1))
        ledger.append(claimed(2))
        for step in (10, 20, 30, 40):
            self.commit(step)

    def ledger(self, store: ObjectStore) -> Witnessed:
        return Witnessed(run_log(store, RUN), self.told)

    def commit(self, step: int) -> None:
        local = write_checkpoint(self.disk, step, files={"adapter": b"%d" % step})
        CheckpointStore(self.store, RUN, self.ledger(self.store)).publish(local, 2, incarnation(2))

    def gc(self, store: ObjectStore | None = None) -> None:
        """What ``gc --apply`` does for a run."""
        store = store or self.store
        for _ in range(2):  # the second time deletes what the first has retired
            ledger = self.ledger(store)
            state = ledger.refresh()
            objects = take(store).runs.get(RUN, RunObjects())
            plan = plan_run(RUN, objects, state, (), keep=Keep(last=2), grace_s=0.0, now_s=None)
            for done in collect_run(store, plan, ledger, clock=lambda: 6.0):
                assert not done.denied

    def controller(self, store: ObjectStore | None = None) -> None:
        """What a controller does between its other work; a lost race costs it a tick."""
        store = store or self.store
        ledger = self.ledger(store)
        checkpoints = CheckpointStore(store, RUN, ledger)
        try:
            state = ledger.refresh()
            checkpoints.retire(plan_prune(state.checkpoints, keep_last=2))
            state = checkpoints.reap(ledger.refresh())
            checkpoints.sweep_orphans(state)
        except Fenced:
            return

    def check(self, *, newest: int) -> None:
        """Nothing is lost, and whoever cleans up next leaves nothing but what is kept."""
        assert violations(self.store, RUN, self.told) == []
        self.gc()
        state = run_log(self.store, RUN).refresh()
        assert [c.step for c in state.checkpoints] == [newest - 10, newest]
        assert state.retired == ()
        assert leftovers(self.store, RUN, state) == []
        assert len(list(self.store.list(layout.data_prefix(RUN)))) == 2
        assert violations(self.store, RUN, self.told) == []


@pytest.mark.parametrize("first", ["gc", "controller"])
@pytest.mark.parametrize("second", ["gc", "controller", "trainer"])
def test_whoever_comes_between_any_two_calls_does_no_harm(first: str, second: str, tmp_path: Path) -> None:
    for at in count(1):
        world = World(tmp_path)
        meanwhile = {
            "gc": world.gc,
            "controller": world.controller,
            "trainer": lambda world=world: world.commit(50),
        }[second]
        store = Interrupted(world.store, at, meanwhile)
        world.gc(store) if first == "gc" else world.controller(store)
        came = store.calls >= at
        world.check(newest=50 if came and second == "trainer" else 40)
        if not came:
            assert at > 8, "there are calls to come between"
            return


@pytest.mark.parametrize("fault", [Fault.DIE_BEFORE, Fault.DIE_AFTER, Fault.DIE_HALF_WAY])
def test_a_collector_that_dies_at_any_call_is_succeeded_by_the_next(fault: Fault, tmp_path: Path) -> None:
    for at in count(1):
        world = World(tmp_path)
        try:
            world.gc(FlakyStore(world.store, at, fault))
        except Died:
            world.check(newest=40)
        else:
            assert at > 8, "there are calls to die at"
            return


def test_two_controllers_that_end_and_finish_a_run_at_once_agree(tmp_path: Path) -> None:
    """Whoever is second is told so, or finds its very record there."""
    for at in count(1):
        world = World(tmp_path)

        def finish(store: ObjectStore, world: World = world) -> None:
            ledger = world.ledger(store)
            try:
                ledger.append(ended(2))
                ledger.append(finished())
            except Fenced:
                return

        store = Interrupted(world.store, at, lambda finish=finish, world=world: finish(world.store))  # type: ignore[misc]
        finish(store)
        state = run_log(world.store, RUN).refresh()
        assert state.finished is not None
        assert violations(world.store, RUN, world.told) == []
        if store.calls < at:
            return
