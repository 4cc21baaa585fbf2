"""Snapshots in the store: whatever is wrong with one, it costs time and no more."""

import logging
from collections.abc import Callable

import pytest
import zstandard
from support.runs import RUN, claimed, ended, lived
from support.snapshots import HISTORY, Counting, snapshot_of, written

from storage import layout, snapshots
from storage.errors import AccessDenied
from storage.memory import MemoryStore
from storage.object_store import ObjectInfo
from storage.snapshots import Known, encode, hinted_log, read_run, read_sweep, write_run, write_sweep


def test_a_sweeps_snapshot_is_two_requests_however_many_runs_it_has() -> None:
    store = written(*HISTORY)
    known = {f"cat-{n}": Known(snapshot=snapshot_of(store), tidy=n % 2 == 0) for n in range(500)}
    write_sweep(store, "cat", known)
    store.requests()

    assert read_sweep(store, "cat") == known
    assert store.requests() == ["head snapshot.json.zst", "get snapshot.json.zst"]


def test_without_a_snapshot_nothing_is_known() -> None:
    assert read_sweep(MemoryStore(), "cat") == {}
    assert read_run(MemoryStore(), RUN) is None


def flipped(body: bytes, at: int) -> bytes:
    return body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]


def repacked(body: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """A snapshot with its digests right and its content changed."""
    header, _, packed = body.partition(b"\n")
    again = zstandard.ZstdCompressor().compress(change(zstandard.ZstdDecompressor().decompress(packed)))
    return b" ".join((*header.split(b" ")[:-1], snapshots._digest(again))) + b"\n" + again


def bomb(body: bytes) -> bytes:
    packed = zstandard.ZstdCompressor().compress(b"[" * 1000)
    claimed_size = packed[:5] + (1 << 40).to_bytes(8, "little")  # nobody packed so much
    return b" ".join((*snapshots._HEADER, snapshots._digest(claimed_size))) + b"\n" + claimed_size


@pytest.mark.parametrize(
    "damage",
    [
        lambda body: b"",
        lambda body: b"\n" * 9,
        lambda body: body[:-1],
        lambda body: body + b"x",
        lambda body: flipped(body, len(body) - 9),
        lambda body: flipped(body, 24),
        lambda body: body.replace(b"snapshot 1 ", b"snapshot 2 ", 1),
        lambda body: repacked(body, lambda json: json[:-1]),
        lambda body: repacked(body, lambda json: json.replace(b'"next_seq":5', b'"next_seq":0')),
        lambda body: repacked(body, lambda json: json.replace(b'"stalls"', b'"stools"')),
        lambda body: repacked(body, lambda json: b"[]"),
        bomb,
    ],
)
def test_a_snapshot_that_is_no_good_is_ignored_with_a_word(
    damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    store = written(*HISTORY)
    write_run(store, RUN, snapshot_of(store))
    place = layout.run_snapshot(RUN)
    store.put(place, damage(store.get(place)))

    with caplog.at_level(logging.WARNING):
        assert read_run(store, RUN) is None
    assert len(caplog.messages) == 1
    assert "ignored, logs are read instead" in caplog.messages[0]


def test_a_huge_snapshot_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    store = written(*HISTORY)
    write_run(store, RUN, snapshot_of(store))
    monkeypatch.setattr(snapshots, "MAX_STORED_BYTES", 10)
    store.requests()

    assert read_run(store, RUN) is None
    assert store.requests() == ["head snapshot.json.zst"]


def test_a_snapshot_that_nobody_would_read_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    store = written(*HISTORY)
    snapshot = snapshot_of(store)
    monkeypatch.setattr(snapshots, "MAX_JSON_BYTES", 10)
    with pytest.raises(ValueError, match="too many for a snapshot"):
        write_run(store, RUN, snapshot)


def test_what_another_version_folded_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    store = written(*HISTORY)
    snapshot = snapshot_of(store)
    with monkeypatch.context() as other:
        other.setattr(snapshots, "_HEADER", (*snapshots._HEADER[:-1], b"0123456789abcdef"))
        write_run(store, RUN, snapshot)

    assert read_run(store, RUN) is None


def test_another_runs_snapshot_is_not_used() -> None:
    store = written(*HISTORY)
    store.put(layout.run_snapshot(RUN), encode({"dog": Known(snapshot=snapshot_of(store))}))
    assert read_run(store, RUN) is None


def test_who_resumes_a_run_starts_from_its_own_snapshot() -> None:
    store = written(*HISTORY)
    write_run(store, RUN, snapshot_of(store))
    lived(store, RUN, ended(), claimed(2))
    store.requests()

    log = hinted_log(store, RUN)
    assert log.refresh().attempt == 2
    assert store.requests() == [
        "head snapshot.json.zst",
        "get snapshot.json.zst",
        "list",
        "get 000000000005.json",
        "get 000000000006.json",
    ]
    log.refresh()
    assert store.requests() == ["list"], "it is looked for once"


class NoSnapshots(Counting):
    """Credentials that allow the log and nothing else."""

    def head(self, key: str) -> ObjectInfo | None:
        if key.endswith("zst"):
            raise AccessDenied("403")
        return super().head(key)


def test_a_snapshot_that_may_not_be_read_is_done_without() -> None:
    store = NoSnapshots()
    lived(store, RUN, *HISTORY)
    assert hinted_log(store, RUN).refresh().committed_step == 20


class Forgetful(MemoryStore):
    """Loses its snapshots between two requests."""

    def get(self, key: str) -> bytes:
        if key.endswith("zst"):
            self.delete([key])
        return super().get(key)


def test_a_snapshot_that_goes_away_meanwhile_is_done_without() -> None:
    store = Forgetful()
    lived(store, RUN, *HISTORY)
    write_run(store, RUN, snapshot_of(store))
    assert hinted_log(store, RUN).refresh().committed_step == 20
