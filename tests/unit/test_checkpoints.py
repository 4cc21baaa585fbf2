"""Publishing, fetching and deleting: a checkpoint exists exactly when its record says so."""

import errno
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from support.flaky_store import Fault, FlakyStore
from support.open_files import no_files_to_open
from support.runs import (
    RUN,
    claimed,
    contents,
    ended,
    finished,
    incarnation,
    read_files,
    ref,
    write_checkpoint,
)

from storage import layout, packing
from storage.checkpoints import CheckpointStore
from storage.errors import (
    Corrupt,
    Fenced,
    InvalidName,
    NotFound,
    Unavailable,
)
from storage.local import (
    LocalCheckpoint,
    Manifest,
    complete_checkpoints,
    staged_checkpoint,
    verify,
)
from storage.log import RunLog, run_log
from storage.memory import MemoryStore
from storage.object_store import ObjectStore
from storage.records import Committed, Quarantined, StoredFile
from storage.uploading import Link


@dataclass
class World:
    """A run in a store, one checkpoint store over it, and a node's disk."""

    store: MemoryStore
    log: RunLog
    checkpoints: CheckpointStore
    disk: Path
    seconds: float = 0.0

    def publish(self, step: int, attempt: int = 1, *, final: bool = False) -> Committed:
        local = write_checkpoint(self.disk / "out", step, final=final)
        return self.checkpoints.publish(local, attempt, incarnation(attempt))

    def data(self) -> list[str]:
        return [info.key for info in self.store.list(layout.data_prefix(RUN))]

    def key(self, checkpoint: Committed, file: str = "adapter.safetensors") -> str:
        return layout.committed_file(RUN, checkpoint, file)


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A run whose first attempt is running."""
    store = MemoryStore()
    log = run_log(store, RUN)
    log.append(claimed())
    made = World(store, log, CheckpointStore(store, RUN, log, clock=lambda: 7.0), tmp_path)
    made.checkpoints = CheckpointStore(store, RUN, log, clock=lambda: 7.0, monotonic=lambda: made.seconds)
    return made


def flip_a_byte(store: MemoryStore, key: str) -> None:
    body = bytearray(store.get(key))
    body[len(body) // 2] ^= 1
    store.put(key, bytes(body))


def test_a_published_checkpoint_is_fetched_bit_by_bit(world: World) -> None:
    committed = world.publish(10)

    assert world.log.state.newest == committed
    assert (committed.step, committed.attempt, committed.metrics) == (10, 1, {"loss": 1 / 11})
    target = world.checkpoints.fetch(committed, world.disk / "in" / "step-000000010")
    assert read_files(target) == contents(10)
    assert [c.path for c in complete_checkpoints(world.disk / "in")] == [target]


def test_publishing_twice_commits_once(world: World) -> None:
    first = world.publish(10)
    again = world.publish(10)
    assert again == first
    assert world.log.next_seq == 2


def test_nothing_is_committed_when_a_file_is_not_what_the_manifest_says(world: World) -> None:
    local = write_checkpoint(world.disk / "out", 10)
    (local.path / "state" / "optimizer.safetensors").write_bytes(b"torn")
    with pytest.raises(Corrupt, match=r"state/optimizer\.safetensors: 4 bytes, its record says"):
        world.checkpoints.publish(local, 1, incarnation(1))
    assert world.log.refresh().newest is None


def test_a_file_that_changes_while_it_is_uploaded_is_not_committed(tmp_path: Path) -> None:
    local = write_checkpoint(tmp_path, 10)

    class Racing(MemoryStore):
        def put(self, key: str, body: bytes | Path) -> None:
            super().put(key, body)
            if isinstance(body, Path):
                with body.open("ab") as file:
                    file.write(b"more")

    store = Racing()
    log = run_log(store, RUN)
    log.append(claimed())
    with pytest.raises(Corrupt, match="changed while it was uploaded"):
        CheckpointStore(store, RUN, log).publish(local, 1, incarnation(1))
    assert log.refresh().newest is None


def test_a_ghost_uploads_under_its_own_prefix_and_is_refused(world: World) -> None:
    ghosts_view = run_log(world.store, RUN)
    ghosts_view.refresh()
    ghost = CheckpointStore(world.store, RUN, ghosts_view)
    world.log.append(ended(1))
    world.log.append(claimed(2))
    mine = world.publish(10, attempt=2)

    local = write_checkpoint(world.disk / "ghost", 10, files={"adapter.safetensors": b"stale"})
    with pytest.raises(Fenced, match="attempt 1 is fenced"):
        ghost.publish(local, 1, incarnation(1))

    assert world.log.refresh().checkpoints == (mine,)
    left = list(world.store.list(layout.checkpoint_prefix(RUN, 1, incarnation(1), 10)))
    assert left == [], "who was refused takes back what it uploaded: nobody may look there again"
    fetched = world.checkpoints.fetch(mine, world.disk / "in" / "step-000000010")
    assert read_files(fetched) == contents(10)


def test_a_fetch_that_fails_leaves_nothing_behind(world: World) -> None:
    committed = world.publish(10)
    flip_a_byte(world.store, world.key(committed))
    target = world.disk / "in" / "step-000000010"
    with pytest.raises(Corrupt, match=rf"{world.key(committed)} in memory://: sha256 is .* its record says"):
        world.checkpoints.fetch(committed, target)
    world.store.delete([world.key(committed)])
    with pytest.raises(NotFound, match=r"adapter\.safetensors"):
        world.checkpoints.fetch(committed, target)
    assert list((world.disk / "in").iterdir()) == []


def test_a_file_that_arrives_damaged_once_is_fetched_again(world: World) -> None:
    committed = world.publish(10)
    damaged: list[str] = []

    class NoisyLine(FlakyStore):
        def download(self, key: str, target: Path) -> None:
            super().download(key, target)
            if key not in damaged:
                damaged.append(key)
                target.write_bytes(b"noise")

    noisy = CheckpointStore(NoisyLine(world.store, 0, Fault.REFUSE), RUN, world.log)
    fetched = noisy.fetch(committed, world.disk / "in" / "step-000000010")
    assert read_files(fetched) == contents(10)
    assert len(damaged) == 2


def test_a_directory_that_already_is_the_checkpoint_is_used_and_any_other_is_replaced(world: World) -> None:
    committed = world.publish(10)
    target = world.disk / "in" / "step-000000010"
    world.checkpoints.fetch(committed, target)
    nothing_to_read = CheckpointStore(FlakyStore(world.store, 1, Fault.REFUSE), RUN, world.log)
    assert nothing_to_read.fetch(committed, target) == target

    (target / "adapter.safetensors").write_bytes(b"X" + contents(10)["adapter.safetensors"][1:])
    world.checkpoints.fetch(committed, target)
    assert read_files(target) == contents(10)

    with no_files_to_open(), pytest.raises(Unavailable, match="Too many open files"):
        world.checkpoints.fetch(committed, target)


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "a\\b", "nul\0"])
def test_a_record_with_an_escaping_file_name_is_not_fetched(world: World, name: str) -> None:
    committed = world.publish(10)
    evil = committed.model_copy(update={"files": (StoredFile(name=name, size_bytes=0, sha256="0" * 64),)})
    with pytest.raises(InvalidName):
        world.checkpoints.fetch(evil, world.disk / "in" / "step-000000010")
    assert sorted(os.listdir(world.disk)) == ["out"]


def test_the_newest_is_fetched_and_a_fresh_run_has_none(world: World) -> None:
    assert world.checkpoints.fetch_newest(world.log.state, world.disk / "in") == (None, None)
    world.publish(10)
    newest = world.publish(20)
    checkpoint, path = world.checkpoints.fetch_newest(world.log.state, world.disk / "in")
    assert (checkpoint, path) == (newest, world.disk / "in" / "step-000000020")


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (flip_a_byte, "sha256 is"),
        (lambda store, key: store.put(key, b""), "0 bytes, its record says"),
        (lambda store, key: store.delete([key]), "no such object"),
    ],
)
def test_a_damaged_newest_is_quarantined_and_the_one_before_is_used(
    world: World, harm: Callable[[MemoryStore, str], None], reason: str
) -> None:
    older = world.publish(10)
    newest = world.publish(20)
    harm(world.store, world.key(newest))

    checkpoint, path = world.checkpoints.fetch_newest(world.log.state, world.disk / "in", attempt=1)

    assert checkpoint == older
    assert path is not None
    assert read_files(path) == contents(10)
    said = world.log.entries()[-1].record
    assert isinstance(said, Quarantined)
    assert (said.checkpoint, said.attempt) == (newest.ref, 1)
    assert reason in said.reason
    assert "adapter.safetensors" in said.reason


def test_a_store_that_does_not_answer_quarantines_nothing(world: World) -> None:
    world.publish(10)
    away = CheckpointStore(FlakyStore(world.store, 1, Fault.REFUSE), RUN, world.log)
    with pytest.raises(Unavailable):
        away.fetch_newest(world.log.state, world.disk / "in", attempt=1)
    assert world.log.refresh().quarantined == ()


class BadNode(FlakyStore):
    """A store as a node sees it whose disk, memory or proxy damages whatever it downloads."""

    def __init__(self, store: ObjectStore) -> None:
        super().__init__(store, 0, Fault.REFUSE)

    def download(self, key: str, target: Path) -> None:
        super().download(key, target)
        target.write_bytes(b"X" + target.read_bytes()[1:])


def test_a_bad_node_gives_up_one_checkpoint_at_most_and_never_the_only_one(world: World) -> None:
    """Or one node would let the run begin anew, and its good checkpoints be swept."""
    for step in (10, 20, 30):
        world.publish(step)
    bad = CheckpointStore(BadNode(world.store), RUN, world.log)
    left = []
    for attempt in (2, 3, 4):
        world.log.append(ended(attempt - 1))
        world.log.append(claimed(attempt, node="bad"))
        with pytest.raises(Corrupt, match="sha256 is"):
            bad.fetch_newest(world.log.state, world.disk / "in", attempt=attempt)
        left.append([c.step for c in world.log.refresh().checkpoints])
    assert left == [[10, 20], [10], [10]]

    world.log.append(ended(4))
    world.log.append(claimed(5, node="good"))
    checkpoint, _ = world.checkpoints.fetch_newest(world.log.state, world.disk / "in", attempt=5)
    assert checkpoint is not None
    assert checkpoint.step == 10


@pytest.mark.parametrize(("nodes", "tries"), [(("n1", "n2"), 2), (("n1", "n1", "n1"), 3)])
def test_the_only_checkpoint_is_given_up_once_enough_have_found_it_damaged(
    world: World, nodes: tuple[str, ...], tries: int
) -> None:
    """Or a run whose only checkpoint is damaged would never go on."""
    only = world.publish(10)
    flip_a_byte(world.store, world.key(only))
    for attempt, node in enumerate(nodes, start=2):
        world.log.append(ended(attempt - 1))
        world.log.append(claimed(attempt, node=node))
        if attempt - 1 < tries:
            with pytest.raises(Corrupt):
                world.checkpoints.fetch_newest(world.log.state, world.disk / "in", attempt=attempt)
            assert world.log.refresh().newest == only
    fetched = world.checkpoints.fetch_newest(world.log.state, world.disk / "in", attempt=tries + 1)
    assert fetched == (None, None)
    assert [known for known, _ in world.log.state.quarantined] == [only.ref]


def test_an_attempt_that_is_over_gives_up_nothing(world: World) -> None:
    """It may wake in the middle of its fetch, on a node of which nobody knows what it is worth."""
    world.publish(10)
    newest = world.publish(20)
    seen_before = world.log.state
    world.log.append(ended(1))
    world.log.append(claimed(2))
    ghost = CheckpointStore(BadNode(world.store), RUN, run_log(world.store, RUN))
    with pytest.raises(Fenced, match="attempt 1 is fenced"):
        ghost.fetch_newest(seen_before, world.disk / "in", attempt=1)
    assert world.log.refresh().newest == newest


def test_a_reader_that_is_no_attempt_gives_up_nothing(world: World) -> None:
    world.publish(10)
    newest = world.publish(20)
    reader = CheckpointStore(BadNode(world.store), RUN, world.log)
    with pytest.raises(Corrupt):
        reader.fetch_newest(world.log.state, world.disk / "in")
    assert world.log.refresh().newest == newest


def test_a_checkpoint_that_was_retired_meanwhile_is_no_fault(world: World) -> None:
    world.publish(10)
    seen_before = world.log.state
    newer = world.publish(20)
    world.checkpoints.retire([ref(10)])
    world.checkpoints.reap(world.log.state)

    checkpoint, _ = world.checkpoints.fetch_newest(seen_before, world.disk / "in")

    assert checkpoint == newer
    assert world.log.refresh().quarantined == ()


def test_a_damaged_result_of_a_run_that_is_over_is_an_error(world: World) -> None:
    world.publish(10)
    result = world.publish(20, final=True)
    world.log.append(finished())
    flip_a_byte(world.store, world.key(result))
    with pytest.raises(Corrupt, match="sha256 is"):
        world.checkpoints.fetch_newest(world.log.state, world.disk / "in")


def test_a_step_that_does_not_exist_is_an_error_that_lists_those_that_do(world: World) -> None:
    world.publish(10)
    world.publish(20)
    message = "run cat-r16 has no checkpoint of step 15; there are: 10, 20"
    with pytest.raises(NotFound, match=message):
        world.checkpoints.fetch_step(world.log.state, 15, world.disk / "in")
    checkpoint, path = world.checkpoints.fetch_step(world.log.state, 10, world.disk / "in")
    assert checkpoint.step == 10
    assert read_files(path) == contents(10)


def test_the_newest_cannot_be_retired(world: World) -> None:
    world.publish(10)
    newest = world.publish(20)
    with pytest.raises(Fenced, match="is the newest checkpoint"):
        world.checkpoints.retire([newest.ref])
    assert world.checkpoints.retire([]) is None


def test_retired_data_goes_after_the_grace_period_and_only_its_own(world: World) -> None:
    world.publish(10)
    newest = world.publish(20)
    world.checkpoints.retire([ref(10)])

    world.checkpoints.reap(world.log.state, grace_s=60)
    assert len(world.data()) == 4
    world.seconds = 59.0
    world.checkpoints.reap(world.log.state, grace_s=60)
    assert len(world.data()) == 4
    world.seconds = 60.0
    world.checkpoints.reap(world.log.state, grace_s=60)

    assert world.data() == sorted(world.key(newest, name) for name in contents(20))
    assert world.log.state.retired == ()
    assert world.checkpoints.reap(world.log.state, grace_s=60) == world.log.state


def put_orphan(store: ObjectStore, attempt: int, step: int) -> str:
    key = layout.checkpoint_file(RUN, attempt, incarnation(attempt), step, "adapter.safetensors")
    store.put(key, b"never committed")
    return key


def test_only_what_no_attempt_can_commit_any_more_is_swept(world: World) -> None:
    world.publish(10)
    world.publish(20)
    world.checkpoints.retire([ref(10)])
    world.log.append(ended(1))
    world.log.append(claimed(2))
    old, in_flight, newer = (put_orphan(world.store, attempt, 30) for attempt in (1, 2, 3))
    named = set(world.data()) - {old, in_flight, newer}

    assert world.checkpoints.sweep_orphans(world.log.state) == 1
    assert set(world.data()) == named | {in_flight, newer}

    world.log.append(finished())
    assert world.checkpoints.sweep_orphans(world.log.state) == 1
    assert set(world.data()) == named | {newer}


def test_uploads_are_aborted_once_nobody_can_finish_them(world: World) -> None:
    aborted: list[str] = []

    class Uploads(FlakyStore):
        def abort_uploads(self, prefix: str) -> int:
            aborted.append(prefix)
            return 0

    checkpoints = CheckpointStore(Uploads(world.store, 0, Fault.REFUSE), RUN, world.log)
    checkpoints.sweep_orphans(world.log.state)
    assert aborted == []
    world.log.append(finished())
    checkpoints.sweep_orphans(world.log.state)
    assert aborted == [layout.data_prefix(RUN)]


def test_quarantined_data_is_kept_for_inspection_until_the_run_is_over(world: World) -> None:
    world.publish(10)
    bad = world.publish(20)
    world.log.append(Quarantined(checkpoint=bad.ref, reason="sha256", at=0.0))
    world.log.append(ended(1))
    world.log.append(claimed(2))
    assert world.checkpoints.sweep_orphans(world.log.state) == 0
    world.log.append(finished())
    assert world.checkpoints.sweep_orphans(world.log.state) == 2
    assert world.key(bad) not in world.data()


class Uplink(MemoryStore):
    """Takes its time, as the world's clock tells it, and notes what is put."""

    def __init__(self, bytes_s: float) -> None:
        super().__init__()
        self.bytes_s = bytes_s
        self.puts: list[str] = []
        self.fails_at: str | None = None
        self.world: World

    def put(self, key: str, body: bytes | Path) -> None:
        if "/data/" in key:
            name = key.rpartition("/")[2]
            if self.fails_at and self.fails_at in name:
                raise Unavailable("cut")
            self.puts.append(name)
            self.world.seconds += (
                body.stat().st_size if isinstance(body, Path) else len(body)
            ) / self.bytes_s
        super().put(key, body)


def linked(tmp_path: Path, bytes_s: float = 1e6) -> tuple[World, Uplink]:
    """A world whose store lies behind a link of so many bytes a second."""
    store = Uplink(bytes_s)
    log = run_log(store, RUN)
    log.append(claimed())
    made = World(store, log, CheckpointStore(store, RUN, log), tmp_path)
    made.checkpoints = CheckpointStore(store, RUN, log, monotonic=lambda: made.seconds)
    store.world = made
    return made, store


def trained(step: int, *, numbers: int = 100_000) -> dict[str, bytes]:
    """Files as training leaves them: of real numbers, in the safetensors format."""
    random = np.random.default_rng(step)

    def tensor() -> bytes:
        body = (random.standard_normal(numbers) * 1e-3).astype(np.float32).tobytes()
        header = json.dumps({"w": {"dtype": "F32", "shape": [numbers], "data_offsets": [0, len(body)]}})
        return len(header).to_bytes(8, "little") + header.encode() + body

    return {
        "adapter.safetensors": tensor(),
        "optimizer.safetensors": tensor() + tensor(),
        "state.json": b"{}",
    }


def publish(world: World, step: int, *, only: tuple[str, ...] | None = None) -> Committed:
    local = write_checkpoint(world.disk / "out", step, files=trained(step))
    return world.checkpoints.publish(local, 1, incarnation(1), only=only)


ADAPTER_ONLY = ("adapter.safetensors", "state.json")


def test_what_is_sent_over_a_slow_link_is_packed_and_comes_back_bit_by_bit(tmp_path: Path) -> None:
    world, store = linked(tmp_path)

    committed = publish(world, 10)

    adapter, optimizer, progress = committed.files
    assert adapter.packed is not None
    assert optimizer.packed is not None
    assert progress.packed is None, "too small to be worth it"
    assert (adapter.packed.codec, adapter.size_bytes) == ("shuffle4.zstd", len(trained(10)[adapter.name]))
    assert store.puts == [
        "adapter.safetensors.shuffle4.zstd",
        "optimizer.safetensors.shuffle4.zstd",
        "state.json",
    ]
    assert world.checkpoints.sent_bytes < 0.9 * sum(map(len, trained(10).values()))
    assert [p.name for p in (world.disk / "out").iterdir()] == ["step-000000010"], "packing leaves nothing"
    again = run_log(store, RUN).refresh()
    target = CheckpointStore(store, RUN, run_log(store, RUN)).fetch_newest(again, world.disk / "in")[1]
    assert target is not None
    assert read_files(target) == trained(10)
    assert sorted(os.listdir(world.disk / "in")) == ["step-000000010"], "unpacking leaves nothing"


def test_what_is_sent_over_a_fast_link_is_not_packed_once_that_is_known(tmp_path: Path) -> None:
    world, _ = linked(tmp_path, bytes_s=1e12)
    first, second = publish(world, 10), publish(world, 20)
    assert first.files[0].packed is not None, "nothing is known of the link"
    assert all(file.packed is None for file in second.files)


@pytest.mark.parametrize("harm", [flip_a_byte, lambda store, key: store.put(key, b"")])
def test_damage_of_a_packed_file_is_found(tmp_path: Path, harm: Callable[[MemoryStore, str], None]) -> None:
    world, store = linked(tmp_path)
    older, newest = publish(world, 10), publish(world, 20)
    harm(store, world.key(newest, "optimizer.safetensors"))
    with pytest.raises(Corrupt, match=r"optimizer\.safetensors\.shuffle4\.zstd in memory") as damage:
        world.checkpoints.fetch(newest, world.disk / "in" / "step-000000020")
    assert str(world.disk) not in str(damage.value), "no path of a folder that is gone by now"
    assert sorted(os.listdir(world.disk / "in")) == []
    assert world.checkpoints.fetch_newest(world.log.state, world.disk / "in", attempt=1)[0] == older


@pytest.mark.parametrize(
    "other",
    [
        "Adapter.safetensors.shuffle4.ZSTD",
        "adapter.safetensors.shuffle4.zstd/x",
        "adapter.safetensors.shuffle4",
    ],
)
def test_a_packed_file_never_takes_another_files_key(tmp_path: Path, other: str) -> None:
    world, _ = linked(tmp_path)
    zeros = bytes(200_000)
    files = {"adapter.safetensors": trained(10)["adapter.safetensors"], other: zeros}
    local = write_checkpoint(world.disk / "out", 10, files=files)

    committed = world.checkpoints.publish(local, 1, incarnation(1))

    stored = [layout.stored_name(file).casefold() for file in committed.files]
    assert len(set(stored)) == 2
    assert any(file.packed for file in committed.files)
    found = world.checkpoints.fetch(committed, world.disk / "in" / "step-000000010")
    assert read_files(found) == files


def test_a_name_that_would_be_too_long_when_packed_is_sent_as_it_is(tmp_path: Path) -> None:
    world, _ = linked(tmp_path)
    files = {"x" * 252: bytes(200_000)}
    local = write_checkpoint(world.disk / "out", 10, files=files)
    committed = world.checkpoints.publish(local, 1, incarnation(1))
    assert [file.packed for file in committed.files] == [None]


def test_the_rest_of_a_file_that_was_cut_says_nothing_about_the_link(tmp_path: Path) -> None:
    world, store = linked(tmp_path)
    publish(world, 10)
    took_s = world.checkpoints.upload_s
    newer = write_checkpoint(world.disk / "out", 20, files=trained(20))
    expected_s = took_s(newer, 1, incarnation(1))
    store.fails_at = "optimizer"
    with pytest.raises(Unavailable):
        world.checkpoints.publish(newer, 1, incarnation(1))
    store.fails_at, store.bytes_s = None, 1e9  # most of it has arrived

    world.checkpoints.publish(newer, 1, incarnation(1))

    newest = write_checkpoint(world.disk / "out", 30, files=trained(30))
    assert took_s(newest, 1, incarnation(1)) == pytest.approx(expected_s, rel=0.05)


def test_what_the_store_has_acknowledged_is_not_sent_again(tmp_path: Path) -> None:
    world, store = linked(tmp_path)
    store.fails_at = "optimizer"
    with pytest.raises(Unavailable):
        publish(world, 10)
    packed = next((world.disk / "out").glob(".tmp-*/*")).stat().st_ino
    with pytest.raises(Unavailable):
        publish(world, 10)
    assert next((world.disk / "out").glob(".tmp-*/*")).stat().st_ino == packed, "nor is it packed again"
    store.fails_at, store.bytes_s = None, 1e12  # nor another way, though it would now be sent as it is
    committed = publish(world, 10)
    assert store.puts == [
        "adapter.safetensors.shuffle4.zstd",
        "optimizer.safetensors.shuffle4.zstd",
        "state.json",
    ]
    assert all(file.packed for file in committed.files[:2])


def test_a_file_that_changed_meanwhile_is_sent_again_or_refused(tmp_path: Path) -> None:
    world, store = linked(tmp_path)
    store.fails_at = "optimizer"
    with pytest.raises(Unavailable):
        publish(world, 10)
    store.fails_at = None
    path = world.disk / "out" / "step-000000010" / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[::-1])
    local = complete_checkpoints(world.disk / "out")[0]
    with pytest.raises(Corrupt, match=r"adapter\.safetensors: sha256 is"):
        world.checkpoints.publish(local, 1, incarnation(1))
    assert world.log.refresh().newest is None


def test_a_checkpoint_is_committed_once_however_it_was_packed(tmp_path: Path) -> None:
    """The reply to its commit was lost, and the next try is another process that knows a faster link."""
    world, store = linked(tmp_path)
    first = publish(world, 10)
    other = CheckpointStore(store, RUN, run_log(store, RUN))
    other._uploader.link = Link(sent_bytes=1e12, seconds=1.0)
    local = complete_checkpoints(world.disk / "out")[0]
    assert other.publish(local, 1, incarnation(1)).files[0].packed is None

    state = world.log.refresh()
    assert state.checkpoints == (first,)
    assert read_files(world.checkpoints.fetch(first, world.disk / "in" / "step-000000010")) == trained(10)


def test_a_disk_without_room_to_pack_sends_the_file_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    world, _ = linked(tmp_path)
    monkeypatch.setattr(packing, "pack", full)
    committed = publish(world, 10)
    assert all(file.packed is None for file in committed.files)
    assert world.log.state.newest == committed


def test_a_salvage_can_be_exported_and_nothing_resumes_from_it(tmp_path: Path) -> None:
    world, _ = linked(tmp_path)
    whole = publish(world, 10)
    salvage = publish(world, 20, only=ADAPTER_ONLY)

    state = world.log.refresh()
    assert not salvage.resumable
    assert (state.checkpoints, state.salvaged) == ((whole,), (salvage,))
    assert state.stored[-1] == salvage
    assert world.checkpoints.fetch_newest(state, world.disk / "in")[0] == whole
    _, path = world.checkpoints.fetch_step(state, 20, world.disk / "export")
    assert set(read_files(path)) == set(ADAPTER_ONLY)
    world.log.append(ended(1))
    world.log.append(claimed(2))
    assert world.checkpoints.sweep_orphans(world.log.state) == 0, "its data is not litter"
    assert world.checkpoints.fetch(salvage, world.disk / "again" / "step-000000020")


def test_the_whole_checkpoint_takes_the_place_of_its_salvage_and_sends_the_rest(tmp_path: Path) -> None:
    world, store = linked(tmp_path)
    publish(world, 20, only=ADAPTER_ONLY)
    assert len(store.puts) == 2
    whole = publish(world, 20)

    assert world.log.refresh().stored == (whole,)
    assert store.puts[2:] == ["optimizer.safetensors.shuffle4.zstd"]
    assert read_files(world.checkpoints.fetch(whole, world.disk / "in" / "step-000000020")) == trained(20)
    # The salvage again, its first reply having been lost: it is part of what is there.
    publish(world, 20, only=ADAPTER_ONLY)
    assert world.log.refresh().stored == (whole,)


def test_how_long_an_upload_takes_is_known_from_those_before(tmp_path: Path) -> None:
    world, _ = linked(tmp_path, bytes_s=1e5)
    local = write_checkpoint(world.disk / "out", 10, files=trained(10))
    assert world.checkpoints.upload_s(local, 1, incarnation(1)) is None
    world.checkpoints.publish(local, 1, incarnation(1))
    took_s = world.seconds
    newer = write_checkpoint(world.disk / "out", 20, files=trained(20))
    assert world.checkpoints.upload_s(newer, 1, incarnation(1)) == pytest.approx(took_s, rel=0.05)
    part_s = world.checkpoints.upload_s(newer, 1, incarnation(1), only=ADAPTER_ONLY)
    assert part_s == pytest.approx(took_s / 3, rel=0.05)
    world.checkpoints.publish(newer, 1, incarnation(1), only=ADAPTER_ONLY)
    assert world.checkpoints.upload_s(newer, 1, incarnation(1)) == pytest.approx(2 * took_s / 3, rel=0.05)


def test_metrics_that_no_record_could_hold_beside_packed_files_are_refused_before_anything_is_sent(
    tmp_path: Path,
) -> None:
    world, store = linked(tmp_path)
    metrics = {f"m/{n:030d}": 0.1 for n in range(14_500)}
    files = {f"{n:04d}": b"" for n in range(2400)}

    def write() -> None:
        with staged_checkpoint(world.disk / "out", 10, metrics=metrics, final=False) as directory:
            for name, body in files.items():
                (directory / name).write_bytes(body)

    with pytest.raises(InvalidName, match=r"14500 metrics and 2400 files take .* log fewer metrics"):
        write()
    assert complete_checkpoints(world.disk / "out") == [], "not even written"

    listed = tuple(StoredFile(name=name, size_bytes=0, sha256="0" * 64) for name in files)
    local = LocalCheckpoint(world.disk, Manifest(step=10, final=False, metrics=metrics, files=listed))
    with pytest.raises(InvalidName, match="log fewer metrics"):
        world.checkpoints.publish(local, 1, incarnation(1))
    assert store.puts == []


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({f"{'a' * 200}/{'b' * 200}{n:05d}": b"" for n in range(1400)}, "1400 files, whose names"),
        ({"Manifest.json": b"{}"}, "write it under another name"),
        ({"x.safetensors": (11_000_000).to_bytes(8, "little") + b" " * 11_000_000}, "header has 11000000"),
    ],
)
def test_what_no_record_or_reader_could_hold_is_refused_before_anything_is_sent(
    tmp_path: Path, files: dict[str, bytes], reason: str
) -> None:
    world, store = linked(tmp_path)
    with pytest.raises(InvalidName, match=reason):
        write_checkpoint(world.disk / "out", 10, files=files)
    assert complete_checkpoints(world.disk / "out") == [], "not even written"

    directory = world.disk / "out" / "step-000000010"
    directory.mkdir()
    for name, body in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(body)
    listed = tuple(StoredFile(name=name, size_bytes=0, sha256="0" * 64) for name in files)
    local = LocalCheckpoint(directory, Manifest(step=10, final=False, metrics={}, files=listed))
    with pytest.raises(InvalidName, match=reason):
        world.checkpoints.publish(local, 1, incarnation(1))
    assert store.puts == []


@pytest.mark.parametrize("names", [("adapter.safetensors", "state.json"), ("state.json",)])
def test_a_file_that_cannot_be_read_now_is_not_damaged(tmp_path: Path, names: tuple[str, ...]) -> None:
    world, _ = linked(tmp_path)
    files = {name: trained(10)[name] for name in names}
    local = write_checkpoint(world.disk / "out", 10, files=files)
    with no_files_to_open(), pytest.raises(Unavailable, match="Too many open files"):
        world.checkpoints.publish(local, 1, incarnation(1))
    with no_files_to_open(), pytest.raises(Unavailable, match="Too many open files"):
        verify(local.path, local.manifest.files)


@pytest.mark.parametrize(
    "names",
    [("../evil",), ("nul\0",), ("x" * 300,), ("d/" * 460 + "x",), ("A", "a"), ("a", "a/b"), ("/etc/x",)],
)
def test_a_manifest_with_bad_names_sends_nothing(tmp_path: Path, names: tuple[str, ...]) -> None:
    world, store = linked(tmp_path)
    listed = tuple(StoredFile(name=name, size_bytes=0, sha256="0" * 64) for name in names)
    local = LocalCheckpoint(world.disk, Manifest(step=10, final=False, metrics={}, files=listed))
    with pytest.raises(InvalidName):
        world.checkpoints.publish(local, 1, incarnation(1))
    assert store.puts == []


def test_a_symlink_in_a_checkpoint_is_not_followed_when_it_is_packed(tmp_path: Path) -> None:
    world, store = linked(tmp_path)
    local = write_checkpoint(world.disk / "out", 10, files=trained(10))
    secret = world.disk / "secret"
    (local.path / "adapter.safetensors").rename(secret)
    (local.path / "adapter.safetensors").symlink_to(secret)
    with pytest.raises((Corrupt, InvalidName), match="symlink"):
        world.checkpoints.publish(local, 1, incarnation(1))
    assert store.puts == []


def test_a_checkpoint_retired_while_it_is_fetched_gives_way_to_the_next_newest(tmp_path: Path) -> None:
    """Row 36: the reader chose by an old state, and the pruner was faster."""
    world, store = linked(tmp_path)
    old = publish(world, 10)
    stale = world.log.state

    class Pruned(FlakyStore):
        """The checkpoint goes between its first file and its second."""

        def download(self, key: str, target: Path) -> None:
            super().download(key, target)
            if world.log.state.newest == old:
                newer = publish(world, 20)
                assert newer.step == 20
                world.checkpoints.retire([old.ref])
                world.checkpoints.reap(world.log.state)

    reader = CheckpointStore(Pruned(store, 0, Fault.REFUSE), RUN, run_log(store, RUN))
    checkpoint, path = reader.fetch_newest(stale, world.disk / "in", attempt=1)
    assert (checkpoint.step if checkpoint else None) == 20
    assert path is not None
    assert read_files(path) == trained(20)
    assert world.log.refresh().quarantined == (), "nobody is to blame"
