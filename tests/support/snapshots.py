"""A log, its snapshot, and a store that counts what is asked of it."""

from collections.abc import Iterator, Sequence

from support.runs import RUN, claimed, committed, lived, ref, retired

from storage import layout
from storage.log import RunSnapshot, run_log
from storage.memory import MemoryStore
from storage.object_store import ObjectInfo, ObjectStore
from storage.records import Record, Started

STARTED = Started(attempt=1, step=0, at=9.0)
HISTORY: tuple[Record, ...] = (claimed(), STARTED, committed(10), committed(20), retired(ref(10)))


class Counting(MemoryStore):
    """Counts requests, each page of a listing as one."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def get(self, key: str) -> bytes:
        self.asked.append(f"get {key.rpartition('/')[2]}")
        return super().get(key)

    def head(self, key: str) -> ObjectInfo | None:
        self.asked.append(f"head {key.rpartition('/')[2]}")
        return super().head(key)

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        self.asked.append("list")
        return super().list(prefix, after)

    def requests(self) -> Sequence[str]:
        """What was asked since this was last called."""
        told, self.asked = self.asked, []
        return told


def written(*records: Record) -> Counting:
    store = Counting()
    lived(store, RUN, *records)
    return store


def key(n: int) -> str:
    return layout.log_entry(layout.run_log_prefix(RUN), n)


def snapshot_of(store: ObjectStore) -> RunSnapshot:
    log = run_log(store, RUN)
    log.refresh()
    snapshot = log.snapshot()
    assert snapshot is not None
    return snapshot
