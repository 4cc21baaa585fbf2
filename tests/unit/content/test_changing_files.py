"""A file that changes while it is sent spoils nothing."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.flaky_store import Died
from support.shared_content import submit, written

from storage import layout
from storage.content import store as content
from storage.content.store import content_log, fetch, store_for
from storage.errors import Corrupt, Unavailable
from storage.memory import MemoryStore


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
