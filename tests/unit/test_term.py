"""Two clusters know nothing of each other: the controller that took office last works on, the other stops."""

import threading
import time
from collections.abc import Iterator

import pytest
from support.fake_cluster import FakeCluster, small_sweep
from support.flaky_store import Fault, FlakyStore

from orchestrator.control.controller import REFRESH_S, Controller
from orchestrator.control.term import SteppedDown, Term
from storage import layout
from storage.errors import Unavailable
from storage.memory import MemoryStore
from storage.object_store import ObjectInfo
from storage.records import Outcome


def test_the_last_to_take_office_holds_it() -> None:
    store = MemoryStore()
    first = Term(store, "cat")
    first.check()

    second = Term(store, "cat")
    second.check()
    with pytest.raises(SteppedDown, match="another controller has taken over"):
        first.check()
    Term(store, "dog")
    second.check()


def test_taking_office_with_a_lost_reply_takes_it_once() -> None:
    store = MemoryStore()
    Term(store, "cat")
    Term(FlakyStore(store, 2, Fault.LOSE_REPLY), "cat").check()  # its create
    assert len(list(store.list(layout.terms_prefix("cat")))) == 2


class Silent(MemoryStore):
    """Lists, and answers nothing else."""

    asked = 0

    def create(self, key: str, body: bytes) -> bool:
        return self._unanswered()

    def get(self, key: str) -> bytes:
        return bytes(self._unanswered())

    def _unanswered(self) -> bool:
        self.asked += 1
        assert self.asked < 10, "it is asked again and again without a pause"
        raise Unavailable("503")


def test_a_store_that_does_not_answer_is_not_asked_for_number_after_number() -> None:
    with pytest.raises(Unavailable):
        Term(Silent(), "cat")


def test_a_sweep_resumed_on_a_second_cluster_ends_there_and_the_first_steps_down() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=2, max_steps=40)
    here, there = (FakeCluster(store, sweep, nodes=1, name=name) for name in ("here", "there"))
    first = Controller(sweep, store, here, clock=here.clock, term=Term(store, sweep.name))
    for _ in range(8):
        first.tick()
        here.advance(1)
        there.advance(1)
    assert any(state.committed_step for state in first.states.values())

    second = Controller(sweep, store, there, clock=there.clock, term=Term(store, sweep.name))
    stepped_down = False
    for _ in range(300):
        if not stepped_down:
            try:
                first.tick()
            except SteppedDown:
                stepped_down = True
                here.close()
        second.tick()
        here.advance(1)
        there.advance(1)
        if second.done:
            break

    assert stepped_down
    assert {state.outcome for state in second.states.values()} == {Outcome.SUCCEEDED}
    assert max(len(state.attempts) for state in second.states.values()) <= 3


class Hanging(MemoryStore):
    """Does not say who is in office until it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.answers = threading.Event()
        self.answers.set()
        self.waiting = threading.Event()

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        if prefix == layout.terms_prefix("cat") and not self.answers.is_set():
            assert threading.current_thread() is not threading.main_thread(), "the one that decides waits"
            self.waiting.set()
            self.answers.wait()
        return super().list(prefix, after)


def test_a_store_that_hangs_is_asked_in_the_background_and_the_answer_is_heeded_when_it_comes() -> None:
    store, sweep = Hanging(), small_sweep(runs=1, max_steps=500)
    cluster = FakeCluster(store, sweep, nodes=1)
    controller = Controller(sweep, store, cluster, clock=cluster.clock, term=Term(store, "cat"))
    controller.tick()
    Term(store, "cat")
    store.answers.clear()

    for _ in range(2 * int(REFRESH_S)):
        cluster.advance()
        controller.tick()
    assert store.waiting.is_set()

    store.answers.set()
    with pytest.raises(SteppedDown):
        tick_for(controller, 30.0)


def tick_for(controller: Controller, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        controller.tick()


def test_a_term_follows_the_newest_also_when_older_ones_were_deleted() -> None:
    store = MemoryStore()
    first, second = Term(store, "cat"), Term(store, "cat")
    store.delete([layout.term("cat", 0)])

    third = Term(store, "cat")

    assert [info.key for info in store.list(layout.terms_prefix("cat"))] == [
        layout.term("cat", 1),
        layout.term("cat", 2),
    ]
    third.check()
    for older in (first, second):
        with pytest.raises(SteppedDown):
            older.check()
