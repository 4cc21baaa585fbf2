"""Shared content on real servers: uploaded once, cut off and continued, fetched, retired and reaped."""

import hashlib
from pathlib import Path

import pytest
from support.flaky_store import Fault, FlakyStore

from storage import layout
from storage.content import store as content
from storage.content.hashing import hashed
from storage.content.state import unreferenced
from storage.content.store import content_log, fetch, store_for
from storage.errors import Corrupt
from storage.garbage.inventory import take
from storage.object_store import ObjectStore
from storage.s3.etag import is_of_file
from trainer.model_files import model_content

LARGE = 17_000_000
"""Sent from the disk; smaller files are sent from memory."""


class Spied(FlakyStore):
    """Notes what is put."""

    def __init__(self, inner: ObjectStore) -> None:
        super().__init__(inner, 0, Fault.REFUSE)
        self.puts: list[str] = []

    def put(self, key: str, body: bytes | Path) -> None:
        self.puts.append(key)
        super().put(key, body)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "unet" / "large.safetensors").write_bytes(hashlib.sha256(b"x").digest() * (LARGE // 32))
    (folder / "unet" / "ünïcode name.json").write_text("{}")
    return folder


def test_what_is_uploaded_is_fetched_and_goes_when_nobody_uses_it(
    store: ObjectStore, model: Path, tmp_path: Path
) -> None:
    local = model_content(model)
    assert store_for(store, "cat", local, submitted=False) is True
    assert store_for(store, "dog", local, submitted=False) is False
    assert list(take(store).contents) == [local.digest]

    log = content_log(store, local.digest)
    stored = log.refresh().readable
    assert stored is not None
    fetch(store, local.digest, stored, tmp_path / "node")
    assert model_content(tmp_path / "node").digest == local.digest

    (what,) = unreferenced(log.state, {"other"}, content.incarnations(store, local.digest))
    assert content.retire(log, what)
    assert content.reap(store, local.digest, log, {"other"}) == 3  # two of the files are equal
    assert content.incarnations(store, local.digest) == {}
    assert store_for(store, "cat", local, submitted=False) is True


def test_an_upload_that_was_cut_off_is_continued(store: ObjectStore, model: Path) -> None:
    local = model_content(model)
    large = next(file for file in local.listing.files if file.size_bytes > content._IN_MEMORY_BYTES)
    store.put(layout.content_file(local.digest, "0badcafe", large.sha256), local.paths[large.name])

    spied = Spied(store)
    store_for(spied, "cat", local, submitted=False)

    (there,) = store.list(layout.content_file(local.digest, "0badcafe", large.sha256))
    known = is_of_file(there.etag, local.paths[large.name])
    assert there.key not in spied.puts
    assert (content.incarnations(store, local.digest).keys() == {"0badcafe"}) == known, (
        "another begins only where the store does not name its bytes"
    )


def test_a_large_object_of_other_bytes_is_not_used(store: ObjectStore, model: Path, tmp_path: Path) -> None:
    local = model_content(model)
    large = next(file for file in local.listing.files if file.size_bytes > content._IN_MEMORY_BYTES)
    (tmp_path / "other").write_bytes(b"x" * large.size_bytes)
    store.put(layout.content_file(local.digest, "0badcafe", large.sha256), tmp_path / "other")

    store_for(store, "cat", local, submitted=False)

    stored = content_log(store, local.digest).refresh().readable
    assert stored is not None
    assert stored.incarnation != "0badcafe"
    fetch(store, local.digest, stored, tmp_path / "node")


def test_a_truncated_object_is_never_taken_for_the_file(
    store: ObjectStore, model: Path, tmp_path: Path
) -> None:
    local = hashed("", {"model_index.json": model / "model_index.json"})
    store_for(store, "cat", local, submitted=False)
    stored = content_log(store, local.digest).refresh().readable
    assert stored is not None
    store.put(layout.content_file(local.digest, stored.incarnation, local.listing.files[0].sha256), b"")

    with pytest.raises(Corrupt, match="the object is damaged"):
        fetch(store, local.digest, stored, tmp_path / "node")
