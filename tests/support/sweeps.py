"""A small sweep under a controller in virtual time: what its logs tell, stores that count or are away."""

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from support.fake_cluster import FILE, FakeCluster, run_to_end, weights_at

from orchestrator.control.controller import Controller
from orchestrator.grid.sweep import Sweep
from storage import layout
from storage.errors import Unavailable
from storage.log import run_log
from storage.memory import MemoryStore
from storage.object_store import ObjectInfo, ObjectStore
from storage.records import Claimed, Committed, Ended, Finished, Outcome, Record, Started, StoredFile
from storage.run_state import RunState

R0, R1 = "cat-0-00000000", "cat-1-00000001"


def records(store: ObjectStore, run_id: str) -> list[Record]:
    log = run_log(store, run_id)
    log.refresh()
    return [entry.record for entry in log.entries()]


def state(store: ObjectStore, run_id: str) -> RunState:
    return run_log(store, run_id).refresh()


def told(store: ObjectStore, run_id: str) -> list[str]:
    """A run's log in short: kinds, with attempt numbers and steps."""
    words = []
    for record in records(store, run_id):
        match record:
            case Claimed(attempt=attempt):
                words.append(f"claimed {attempt}")
            case Committed(step=step):
                words.append(f"committed {step}")
            case Ended(attempt=attempt, reason=reason):
                words.append(f"ended {attempt} {reason}")
            case Finished(outcome=outcome):
                words.append(f"finished {outcome}")
            case other:
                words.append(other.kind)
    return words


def stored_data(store: ObjectStore, run_id: str) -> list[str]:
    return [info.key for info in store.list(layout.data_prefix(run_id))]


def finish(controller: Controller, cluster: FakeCluster, misfortunes: random.Random | None = None) -> None:
    for _ in run_to_end(controller, cluster, misfortunes=misfortunes):
        pass


def ticks(controller: Controller, cluster: FakeCluster, number: int) -> None:
    for _ in range(number):
        controller.tick()
        cluster.advance()


def assert_well_ended(store: ObjectStore, sweep: Sweep, cluster: FakeCluster) -> None:
    """One result a run, the right bytes, no attempt twice, nothing committed that was not resumed from."""
    begun = [(order.run_id, order.attempt) for order in cluster.begun]
    assert len(set(begun)) == len(begun), "an attempt was started twice"
    for run in sweep.runs:
        history = records(store, run.run_id)
        ends = [record for record in history if isinstance(record, Finished)]
        assert [end.outcome for end in ends] == [Outcome.SUCCEEDED], told(store, run.run_id)
        over = state(store, run.run_id)
        assert over.result is not None
        final = store.get(layout.committed_file(run.run_id, over.result, FILE))
        assert final == weights_at(run.run_id, run.spec.base.max_train_steps), "trained from other bytes"
        check_resumptions(history)


def check_resumptions(history: Sequence[Record]) -> None:
    """No committed step is ever trained again."""
    committed = 0
    for record in history:
        if isinstance(record, Committed):
            assert record.step > committed or record.final
            committed = record.step
        if isinstance(record, Started):
            assert record.step == committed, "committed work was lost"


def fake_commit(claimed: Claimed, step: int) -> Committed:
    file = StoredFile(name=FILE, size_bytes=1, sha256="0" * 64)
    return Committed(
        attempt=claimed.attempt, incarnation=claimed.incarnation, step=step, files=(file,), at=0.0
    )


def under_way(
    store: ObjectStore, sweep: Sweep, seconds: int, **cluster: Any
) -> tuple[FakeCluster, Controller]:
    """A controller that has worked on a sweep for so many seconds.

    Args:
        cluster: Of ``FakeCluster``.
    """
    made = FakeCluster(store, sweep, **cluster)
    controller = Controller(sweep, store, made, made.clock)
    ticks(controller, made, seconds)
    return made, controller


def wait_for(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


class Outage:
    """A store that is away for as long as ``away`` says, or only what lies at ``where``."""

    def __init__(self, inner: ObjectStore) -> None:
        self._inner = inner
        self.away = False
        self.where = ""

    def __getattr__(self, name: str) -> Any:
        if self.away and not self.where and name != "url":
            raise Unavailable("503 SlowDown")
        return getattr(self._inner, name)

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        if self.away and prefix.startswith(self.where):
            raise Unavailable("503 SlowDown")
        return self._inner.list(prefix, after)


class Counting(MemoryStore):
    """Tells what was asked of it, without entries of logs that were read one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def take(self) -> list[str]:
        told, self.asked = sorted(self.asked), []
        return told

    def get(self, key: str) -> bytes:
        self.asked.append(f"get {key}")
        return super().get(key)

    def head(self, key: str) -> ObjectInfo | None:
        self.asked.append(f"head {key}")
        return super().head(key)

    def put(self, key: str, body: bytes | Path) -> None:
        self.asked.append(f"put {key}")
        super().put(key, body)

    def create(self, key: str, body: bytes) -> bool:
        self.asked.append(f"create {key}")
        return super().create(key, body)

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        self.asked.append(f"list {prefix}")
        return super().list(prefix, after)

    def delete(self, keys: Iterable[str]) -> None:
        doomed = tuple(keys)
        if doomed:
            self.asked.append(f"delete {len(doomed)}")
        super().delete(doomed)
