"""What belongs to no run: probes, terms, uploads, and contents that sweeps share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from storage import layout
from storage.content.hashing import hashed
from storage.content.store import store_for
from storage.garbage.collecting import Collected, collect_content, collect_uploads, plan_contents
from storage.garbage.inventory import sort_out, take
from storage.garbage.rules import ABANDONED_S, GRACE_S, leftovers
from storage.memory import MemoryStore
from storage.object_store import ObjectInfo, ObjectStore

UUID = "0badcafe-0000-4000-8000-00000badcafe"
PROBES = [f"probe/{UUID}/0", f"probe/doctor-{UUID}/speed/1", "probe/0badcafe0badcafe/granted"]
FOREIGN = ["probe/mars-2020/image.tif", "probe/granted"]
CONTENT = f"content/{'0' * 64}/data/0badcafe/{'f' * 64}"


def test_probes_terms_and_uploads_go_when_old_by_the_stores_clock_and_the_newest_term_stays() -> None:
    now = 1e6
    aged = {"old": now - ABANDONED_S, "new": now - GRACE_S + 1}
    inventory = sort_out(
        [
            *(ObjectInfo(key, 64, aged["old"]) for key in PROBES),
            ObjectInfo(f"probe/{UUID}/1", 64, aged["new"]),
            *(ObjectInfo(key, 9, aged["old"]) for key in FOREIGN),
            *(ObjectInfo(layout.term("cat", n), 9, aged["old"]) for n in (2, 3, 4)),
            ObjectInfo(layout.term("dog", 0), 9, aged["old"]),
            ObjectInfo(layout.sweep_spec("cat"), 9, aged["old"]),
            ObjectInfo("holiday.jpg", 9, aged["old"]),
        ],
        [
            ObjectInfo(CONTENT, 0, aged["old"]),
            ObjectInfo(f"{CONTENT}0", 0, aged["new"]),
            *(ObjectInfo(key, 0, aged["old"]) for key in (*FOREIGN, "r", "backups/db")),
        ],
    )

    gone = [[info.key for info in infos] for infos in leftovers(inventory, now)]

    assert gone == [PROBES, [layout.term("cat", 2), layout.term("cat", 3)], [CONTENT]]
    assert leftovers(inventory, None) == ((), (), ())
    assert [info.key for info in inventory.unknown] == [*FOREIGN, "holiday.jpg"]


class Uploads(MemoryStore):
    """A store with unfinished uploads, as a bucket has them."""

    def __init__(self, *uploads: ObjectInfo) -> None:
        super().__init__()
        self.uploads = list(uploads)

    def unfinished(self, prefix: str) -> Iterator[ObjectInfo]:
        return (info for info in list(self.uploads) if info.key.startswith(prefix))

    def abort_uploads(self, prefix: str) -> int:
        before, self.uploads = self.uploads, [i for i in self.uploads if not i.key.startswith(prefix)]
        return len(before) - len(self.uploads)


@pytest.mark.parametrize("fresh", ["the same key", "a longer key"])
def test_a_fresh_upload_never_ends_with_an_old_one(fresh: str) -> None:
    old = [ObjectInfo(CONTENT, 0, 1.0), ObjectInfo(PROBES[0], 0, 1.0)]
    begun = ObjectInfo(CONTENT if fresh == "the same key" else f"{CONTENT}0", 0, 2.0)
    store = Uploads(*old, begun)
    assert [part.objects for part in collect_uploads(store, old)] == [0, 1]
    assert [(info.key, info.modified_s) for info in store.uploads] == [(CONTENT, 1.0), (begun.key, 2.0)]
    store.uploads = [info for info in store.uploads if info.modified_s != begun.modified_s]
    assert [part.objects for part in collect_uploads(store, old)] == [1, 0]
    assert store.uploads == []


class Timed(MemoryStore):
    """Says of every object that it was written at 1000."""

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        for info in super().list(prefix, after):
            yield ObjectInfo(info.key, info.size_bytes, 1000.0)


def shared(store: ObjectStore, folder: Path) -> str:
    """A dataset that sweep cat uses, submitted; returns its digest."""
    folder.mkdir()
    (folder / "a.png").write_bytes(b"an image")
    local = hashed("", {"a.png": folder / "a.png"})
    store_for(store, "cat", local, submitted=False)
    store.put(layout.sweep_spec("cat"), b"{}")
    return local.digest


def collect_contents(store: ObjectStore, now_s: float | None) -> tuple[int, int]:
    """What one ``gc`` retires and how many objects it deletes."""
    done = Collected()
    for plan in plan_contents(store, take(store).contents, now_s):
        for part in collect_content(store, plan):
            done.add(part)
    assert (done.failed, done.denied) == ("", "")
    return done.retired, done.objects


def test_content_goes_in_two_phases_once_no_sweep_uses_it(tmp_path: Path) -> None:
    store = Timed()
    digest = shared(store, tmp_path / "data")
    assert collect_contents(store, 1e6) == (0, 0), "cat uses it"

    store.delete([layout.sweep_spec("cat")])
    assert collect_contents(store, None) == (0, 0), "no clock, no age"
    assert collect_contents(store, 1000 + GRACE_S - 1) == (0, 0), "a submission may be under way"
    assert collect_contents(store, 1000 + GRACE_S) == (1, 0)
    assert collect_contents(store, 1000 + GRACE_S - 1) == (0, 0), "the grace is not over"
    assert collect_contents(store, 1000 + GRACE_S) == (0, 2)
    assert collect_contents(store, 1e6) == (0, 0)
    assert [info.key for info in store.list(layout.content_data_prefix(digest))] == []


def test_an_upload_of_content_that_nobody_finished_goes_after_a_day(tmp_path: Path) -> None:
    store = Timed()
    store.put(layout.content_file("a" * 64, "0" * 8, "b" * 64), b"half")
    assert collect_contents(store, 1000 + ABANDONED_S - 1) == (0, 0)
    assert collect_contents(store, 1000 + ABANDONED_S) == (1, 0)
    assert collect_contents(store, 1000 + ABANDONED_S) == (0, 1)
    assert take(store).contents["a" * 64].data == {}
