"""Shared content: uploaded once, whoever dies or races; deleted only when no sweep uses it."""

import contextlib
import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
from support.flaky_store import Died, Fault, FlakyStore
from support.interrupted_store import InterruptedStore

from storage import layout
from storage.content import store as content
from storage.content.state import (
    Listing,
    Stored,
    Used,
    listing_digest,
    unreferenced,
)
from storage.content.store import (
    Identity,
    LocalContent,
    content_log,
    fetch,
    store_for,
)
from storage.errors import (
    Corrupt,
    Fenced,
    InvalidName,
    NotFound,
    Unavailable,
)
from storage.garbage.inventory import take
from storage.memory import MemoryStore
from storage.object_store import ObjectStore
from storage.records import StoredFile
from storage.s3.etag import is_of_file
from storage.s3.uplink import PART_BYTES

T = TypeVar("T")

FILES = {"a.png": b"image one", "b/c.png": b"image two", "d.txt": b"image one", "metadata.jsonl": b"{}" * 40}


class SharedFlakyStore(FlakyStore):
    """A flaky store that many threads may call: one at a time."""

    def __init__(self, inner: ObjectStore, at: int, fault: Fault) -> None:
        super().__init__(inner, at, fault)
        self._lock = threading.Lock()

    def _call(self, effect: Callable[[], T], half: Callable[[], object] = lambda: None) -> T:
        with self._lock:
            return super()._call(effect, half)


@pytest.fixture
def local(tmp_path: Path) -> LocalContent:
    return written(tmp_path / "dataset", FILES)


def written(folder: Path, files: dict[str, bytes]) -> LocalContent:
    for name, body in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(body)
    listing = Listing(
        files=tuple(
            StoredFile(name=name, size_bytes=len(body), sha256=hashlib.sha256(body).hexdigest())
            for name, body in files.items()
        )
    )
    paths = {name: folder / name for name in files}
    return LocalContent(
        listing=listing, paths=paths, identities={name: Identity.of(path) for name, path in paths.items()}
    )


def submit(store: ObjectStore, local: LocalContent, sweep: str = "cat") -> None:
    """What ``orchestrate sweep`` does, in its order."""
    key = layout.sweep_spec(sweep)
    store_for(store, sweep, local, submitted=store.head(key) is not None)
    store.create(key, b"{}")
    store_for(store, sweep, local, submitted=True)


def collect(store: ObjectStore, digest: str) -> None:
    """What a garbage collector does whose grace is nought."""
    for _ in range(2):  # an uploader's prefix that appears between the two counts as abandoned
        log = content_log(store, digest)
        state, seen = log.refresh(), content.incarnations(store, digest)
        for what in unreferenced(state, sweeps(store), seen):
            content.retire(log, what)
        content.reap(store, digest, log, sweeps(store))


def sweeps(store: ObjectStore) -> set[str]:
    return {parsed[1] for info in store.list("sweeps/") if (parsed := layout.parse_spec(info.key))}


def assert_readable(store: ObjectStore, digest: str, target: Path) -> None:
    stored = content_log(store, digest).refresh().readable
    assert stored is not None
    fetch(store, digest, stored, target)
    found = {p.relative_to(target).as_posix(): p.read_bytes() for p in target.rglob("*") if p.is_file()}
    assert found == FILES


def test_a_stored_content_is_fetched_as_it_was(local: LocalContent, tmp_path: Path) -> None:
    store = MemoryStore()

    assert store_for(store, "cat", local, submitted=False) is True

    assert_readable(store, local.digest, tmp_path / "node")
    assert list(take(store).contents) == [local.digest]


def test_more_files_than_a_listing_holds_are_refused_before_anything_is_sent(
    local: LocalContent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "MAX_LISTING_BYTES", 300)
    store = MemoryStore()

    with pytest.raises(InvalidName, match=r"its 4 files take \d+ bytes, at most 300: split it"):
        store_for(store, "cat", local, submitted=False)
    assert list(store.list("")) == []


def test_a_content_is_sent_once_for_all_sweeps(local: LocalContent) -> None:
    store = MemoryStore()
    submit(store, local, "cat")
    before = {info.key for info in store.list("content/") if "/data/" in info.key}

    assert store_for(store, "dog", local, submitted=False) is False

    assert {info.key for info in store.list("content/") if "/data/" in info.key} == before
    live = content_log(store, local.digest).refresh().live
    assert live is not None
    assert {user.sweep for user in live.users} == {"cat", "dog"}


def test_equal_files_are_sent_once_and_progress_tells_all_bytes(local: LocalContent) -> None:
    store, sent = MemoryStore(), list[int]()

    store_for(store, "cat", local, submitted=False, on_sent=sent.append)

    data = [i for i in store.list("content/") if "/data/" in i.key and not i.key.endswith("listing.json")]
    assert len(data) == len(set(FILES.values())) == 3
    assert sorted(sent) == sorted(info.size_bytes for info in data)


@pytest.mark.parametrize("fault", [Fault.DIE_BEFORE, Fault.DIE_AFTER])
def test_an_upload_that_dies_anywhere_is_finished_by_the_next(
    fault: Fault, local: LocalContent, tmp_path: Path
) -> None:
    undisturbed = SharedFlakyStore(MemoryStore(), 0, fault)
    submit(undisturbed, local)
    for at in range(1, undisturbed.calls + 1):
        store = MemoryStore()
        with contextlib.suppress(Died):
            submit(SharedFlakyStore(store, at, fault), local)
        if sweeps(store):
            assert_readable(store, local.digest, tmp_path / f"at-{at}")

        submit(store, local)

        assert_readable(store, local.digest, tmp_path / f"node-{at}")
        assert len(content.incarnations(store, local.digest)) == 1, "what was sent is not sent again"


def test_a_file_that_arrived_is_not_sent_again(local: LocalContent) -> None:
    store = MemoryStore()
    store_for(store, "cat", local, submitted=False)
    for info in list(store.list(layout.content_log_prefix(local.digest))):
        store.delete([info.key])  # as after a death just before the record
    counting = SharedFlakyStore(store, 0, Fault.REFUSE)
    puts: list[str] = []
    counting.put = lambda key, body: (puts.append(key), store.put(key, body))[1]  # type: ignore

    store_for(counting, "cat", local, submitted=False)

    assert [key.rpartition("/")[2] for key in puts] == ["listing.json"]


@pytest.mark.parametrize("fault", [Fault.LOSE_REPLY, Fault.REFUSE])
def test_a_lost_reply_costs_another_try_and_nothing_else(
    fault: Fault, local: LocalContent, tmp_path: Path
) -> None:
    undisturbed = SharedFlakyStore(MemoryStore(), 0, fault)
    submit(undisturbed, local)
    for at in range(1, undisturbed.calls + 1):
        store = MemoryStore()
        with contextlib.suppress(Unavailable):
            submit(SharedFlakyStore(store, at, fault), local)
        submit(store, local)
        assert_readable(store, local.digest, tmp_path / str(at))


def test_gc_at_any_point_of_a_submission_costs_no_sweep_its_content(
    local: LocalContent, tmp_path: Path
) -> None:
    calm = InterruptedStore(0, lambda store: None)
    submit(calm, local)
    for at in range(1, calm.calls + 1):
        store = InterruptedStore(at, lambda store: collect(store, local.digest))

        submit(store, local)

        assert_readable(store, local.digest, tmp_path / str(at))


@pytest.mark.parametrize("before", ["a dead submission", "a deleted sweep"])
def test_a_submission_at_any_point_of_gc_keeps_its_content(
    before: str, local: LocalContent, tmp_path: Path
) -> None:
    def prepare(store: ObjectStore) -> None:
        store_for(store, "cat" if before == "a dead submission" else "old", local, submitted=False)

    calm = InterruptedStore(0, lambda store: None)
    prepare(calm)
    start = calm.calls
    collect(calm, local.digest)
    for at in range(start + 1, calm.calls + 1):
        store = InterruptedStore(at, lambda store: submit(store, local))
        prepare(store)

        collect(store, local.digest)

        assert sweeps(store) == {"cat"}
        assert_readable(store, local.digest, tmp_path / str(at))


@pytest.mark.parametrize("fault", [Fault.DIE_BEFORE, Fault.DIE_HALF_WAY, Fault.DIE_AFTER])
def test_gc_that_dies_anywhere_is_finished_by_the_next(fault: Fault, local: LocalContent) -> None:
    def prepared() -> MemoryStore:
        store = MemoryStore()
        store_for(store, "gone", local, submitted=False)
        store.put(layout.content_file(local.digest, "0badcafe", "0" * 64), b"half an upload")
        return store

    undisturbed = SharedFlakyStore(prepared(), 0, fault)
    collect(undisturbed, local.digest)
    for at in range(1, undisturbed.calls + 1):
        store = prepared()
        with contextlib.suppress(Died):
            collect(SharedFlakyStore(store, at, fault), local.digest)

        collect(store, local.digest)

        state = content_log(store, local.digest).refresh()
        assert content.incarnations(store, local.digest) == {}
        assert state.live is None
        assert state.retired == ()


def test_a_used_content_is_not_retired(local: LocalContent) -> None:
    store = MemoryStore()
    submit(store, local)
    log = content_log(store, local.digest)

    assert unreferenced(log.refresh(), {"cat"}) == ()
    (what,) = unreferenced(log.state, set())
    submit(store, local, "dog")  # after gc has looked

    assert content.retire(log, what) is False
    assert log.refresh().live is not None


def test_an_upload_that_was_given_up_is_never_stored(local: LocalContent) -> None:
    store = MemoryStore()
    store.put(layout.content_file(local.digest, "0badcafe", "0" * 64), b"half an upload")
    log = content_log(store, local.digest)
    (what,) = unreferenced(log.refresh(), {"cat"}, content.incarnations(store, local.digest))
    assert what.stored is None
    assert content.retire(log, what)

    late = Stored(incarnation="0badcafe", listing="0" * 64, files=1, size_bytes=1, at=0.0)
    with pytest.raises(Fenced, match="was given up"):
        log.append(late)
    submit(store, local)
    assert_live_is_not("0badcafe", store, local.digest)


def assert_live_is_not(incarnation: str, store: ObjectStore, digest: str) -> None:
    live = content_log(store, digest).refresh().live
    assert live is not None
    assert live.incarnation != incarnation


def test_what_a_late_writer_leaves_of_a_reaped_upload_goes_with_the_next_gc(local: LocalContent) -> None:
    store = MemoryStore()
    store_for(store, "gone", local, submitted=False)
    (incarnation,) = content.incarnations(store, local.digest)
    collect(store, local.digest)
    store.put(layout.content_file(local.digest, incarnation, "0" * 64), b"late")

    collect(store, local.digest)

    assert content.incarnations(store, local.digest) == {}


def test_a_retired_content_is_readable_until_it_is_deleted(local: LocalContent, tmp_path: Path) -> None:
    store = MemoryStore()
    store_for(store, "gone", local, submitted=False)
    log = content_log(store, local.digest)
    (what,) = unreferenced(log.refresh(), set())
    content.retire(log, what)

    assert_readable(store, local.digest, tmp_path / "node")
    content.reap(store, local.digest, log, set())
    assert log.refresh().readable is None


def test_a_use_of_a_retired_content_is_refused(local: LocalContent) -> None:
    store = MemoryStore()
    store_for(store, "gone", local, submitted=False)
    log = content_log(store, local.digest)
    (what,) = unreferenced(log.refresh(), set())
    content.retire(log, what)

    with pytest.raises(Fenced, match="not stored"):
        log.append(Used(incarnation=what.incarnation, sweep="cat", claim="00000001", at=0.0))


@pytest.mark.parametrize("size", [10, content._IN_MEMORY_BYTES + 1])
def test_a_file_that_changes_while_it_is_sent_spoils_nothing(size: int, tmp_path: Path) -> None:
    local = written(tmp_path / "dataset", {"a.png": b"x" * size})
    (tmp_path / "dataset" / "a.png").write_bytes(b"y" * size)
    store = MemoryStore()

    with pytest.raises(Corrupt, match=r"a\.png: changed while it was being uploaded"):
        store_for(store, "cat", local, submitted=False)

    state = content_log(store, local.digest).refresh()
    assert state.live is None
    assert {upload.incarnation for upload in state.retired} >= content.incarnations(
        store, local.digest
    ).keys()


class Changing(MemoryStore):
    """While the first large file is sent it changes for a moment; then its sender learns of this error."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error: BaseException | None = error

    def put(self, key: str, body: bytes | Path) -> None:
        if not isinstance(body, Path) or self.error is None:
            super().put(key, body)
            return
        error, self.error = self.error, None
        right = body.read_bytes()
        body.write_bytes(b"y" + right[1:])
        super().put(key, body)
        body.write_bytes(right)
        raise error


@pytest.mark.parametrize("error", [Died(), Unavailable("cut")])
def test_a_large_object_is_not_taken_for_the_file_by_its_size(error: BaseException, tmp_path: Path) -> None:
    files = {"model.safetensors": b"x" * (content._IN_MEMORY_BYTES + 1)}
    store = Changing(error)
    with pytest.raises((Died, Corrupt)):
        store_for(store, "cat", written(tmp_path / "model", files), submitted=False)

    local = written(tmp_path / "model", files)
    store_for(store, "cat", local, submitted=False)

    stored = content_log(store, local.digest).refresh().readable
    assert stored is not None
    fetch(store, local.digest, stored, tmp_path / "node")


class Held(MemoryStore):
    """The upload of the file of one name waits until it may go on."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.inside, self.goes_on = name, threading.Event(), threading.Event()

    def put(self, key: str, body: bytes | Path) -> None:
        if isinstance(body, Path) and body.parent.name == self.name:
            self.inside.set()
            assert self.goes_on.wait(30)
        super().put(key, body)


def test_a_file_that_changes_while_it_is_sent_damages_no_other_submissions_content(tmp_path: Path) -> None:
    body = b"x" * (content._IN_MEMORY_BYTES + 1)
    mine, theirs = (written(tmp_path / who, {"model.bin": body}) for who in ("mine", "theirs"))
    store = Held("theirs")
    store.put(layout.content_file(mine.digest, "00000001", "f" * 64), b"half an upload of one that died")

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(store_for, store, "dog", theirs, submitted=False)
        assert store.inside.wait(30)
        submit(store, mine)
        theirs.paths["model.bin"].write_bytes(b"y" * len(body))
        store.goes_on.set()
        with pytest.raises(Corrupt, match="changed while it was being uploaded"):
            other.result()

    live = content_log(store, mine.digest).refresh().live
    assert live is not None
    assert live.stored is not None
    fetch(store, mine.digest, live.stored, tmp_path / "node")


def test_a_file_that_changed_during_an_upload_that_failed_is_said_to_have(tmp_path: Path) -> None:
    files = {"model.safetensors": b"x" * (content._IN_MEMORY_BYTES + 1)}
    store = Changing(Unavailable("cut"))
    local = written(tmp_path / "model", files)
    with pytest.raises(Corrupt, match="changed while it was being uploaded"):
        store_for(store, "cat", local, submitted=False)
    assert (
        content_log(store, local.digest).refresh().condemned
        == content.incarnations(store, local.digest).keys()
    )


@pytest.mark.parametrize("size_bytes", [0, 5, PART_BYTES, PART_BYTES + 1, 2 * PART_BYTES])
def test_an_object_that_the_store_names_by_its_bytes_is_known(size_bytes: int, tmp_path: Path) -> None:
    body = b"x" * size_bytes
    (tmp_path / "file").write_bytes(body)
    md5s = [hashlib.md5(body[n : n + PART_BYTES]).digest() for n in range(0, max(size_bytes, 1), PART_BYTES)]
    in_parts = f"{hashlib.md5(b''.join(md5s)).hexdigest()}-{len(md5s)}"
    for etag in (hashlib.md5(body).hexdigest(), in_parts):
        assert is_of_file(etag, tmp_path / "file")
    others = (
        None,
        "",
        "0" * 32,
        f"{'0' * 32}-{len(md5s)}",
        "d41d8cd9-what",
        hashlib.md5(b"other").hexdigest(),
    )
    assert not any(is_of_file(etag, tmp_path / "file") for etag in others)


def test_a_damaged_object_is_never_fetched_as_if_it_were_whole(local: LocalContent, tmp_path: Path) -> None:
    store = MemoryStore()
    store_for(store, "cat", local, submitted=False)
    stored = content_log(store, local.digest).refresh().readable
    assert stored is not None
    key = layout.content_file(local.digest, stored.incarnation, local.listing.files[0].sha256)
    store.put(key, b"image 0ne")

    with pytest.raises(Corrupt, match="the object is damaged"):
        fetch(store, local.digest, stored, tmp_path / "node")
    store.delete([key])
    with pytest.raises(NotFound):
        fetch(store, local.digest, stored, tmp_path / "node")


def test_a_listing_of_other_files_is_refused(local: LocalContent, tmp_path: Path) -> None:
    store = MemoryStore()
    store_for(store, "cat", local, submitted=False)
    stored = content_log(store, local.digest).refresh().readable
    assert stored is not None
    forged = local.listing.model_copy(update={"files": local.listing.files[1:]}).model_dump_json().encode()
    store.put(layout.content_listing(local.digest, stored.incarnation), forged)

    with pytest.raises(Corrupt, match="not what the log says"):
        fetch(store, local.digest, stored, tmp_path / "node")
    lying = stored.model_copy(update={"listing": hashlib.sha256(forged).hexdigest()})
    with pytest.raises(Corrupt, match="its files are not those of"):
        fetch(store, local.digest, lying, tmp_path / "node")


@pytest.mark.parametrize("name", ["../evil.png", "/etc/passwd", "a\\b.png", "a\0.png", "A.PNG"])
def test_names_that_a_disk_cannot_take_are_refused_before_anything_is_sent(name: str) -> None:
    files = tuple(StoredFile(name=n, size_bytes=0, sha256="0" * 64) for n in ("a.png", name))
    bad = LocalContent(listing=Listing(files=files), paths={}, identities={})
    store = MemoryStore()

    with pytest.raises(InvalidName):
        store_for(store, "cat", bad, submitted=False)
    assert list(store.list("")) == []


def test_a_single_file_has_its_own_digest_and_one_with_configuration_another() -> None:
    weights = StoredFile(name="sd.safetensors", size_bytes=1, sha256="1" * 64)
    config = StoredFile(name="sd/model_index.json", size_bytes=1, sha256="2" * 64)

    assert listing_digest(Listing(root=weights.name, files=(weights,))) == "1" * 64
    assert listing_digest(Listing(root=weights.name, files=(weights, config))) != "1" * 64
    with pytest.raises(ValueError, match="do not belong"):
        Listing(root=weights.name, files=(weights, config.model_copy(update={"name": "other/x.json"})))
