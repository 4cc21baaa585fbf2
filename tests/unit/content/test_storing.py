"""Shared content: uploaded once, whoever dies, and read as it was or not at all."""

import contextlib
import hashlib
from pathlib import Path

import pytest
from support.flaky_store import Died, Fault
from support.shared_content import FILES, SharedFlakyStore, assert_readable, submit, sweeps

from storage import layout
from storage.content import store as content
from storage.content.state import Listing, listing_digest
from storage.content.store import LocalContent, content_log, fetch, store_for
from storage.errors import Corrupt, InvalidName, NotFound, Unavailable
from storage.garbage.inventory import take
from storage.memory import MemoryStore
from storage.records import StoredFile
from storage.s3.etag import is_of_file
from storage.s3.uplink import PART_BYTES


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
