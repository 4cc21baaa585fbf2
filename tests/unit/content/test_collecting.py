"""Shared content is deleted only when no sweep uses it, whatever else goes on."""

import contextlib
from pathlib import Path

import pytest
from support.flaky_store import Died, Fault
from support.interrupted_store import InterruptedStore
from support.shared_content import SharedFlakyStore, assert_readable, submit, sweeps

from storage import layout
from storage.content import store as content
from storage.content.state import Stored, Used, unreferenced
from storage.content.store import LocalContent, content_log, store_for
from storage.errors import Fenced
from storage.memory import MemoryStore
from storage.object_store import ObjectStore


def collect(store: ObjectStore, digest: str) -> None:
    """What a garbage collector does whose grace is nought."""
    for _ in range(2):  # an uploader's prefix that appears between the two counts as abandoned
        log = content_log(store, digest)
        state, seen = log.refresh(), content.incarnations(store, digest)
        for what in unreferenced(state, sweeps(store), seen):
            content.retire(log, what)
        content.reap(store, digest, log, sweeps(store))


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
