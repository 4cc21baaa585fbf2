"""What is sent over a link: packed where that helps, once, and whole at the other end."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs import RUN, incarnation, read_files, write_checkpoint
from support.stored_run import flip_a_byte, linked, publish, trained

from storage import layout, packing
from storage.checkpoints import CheckpointStore
from storage.errors import Corrupt, InvalidName, Unavailable
from storage.local import complete_checkpoints
from storage.log import run_log
from storage.memory import MemoryStore
from storage.uploading import Link


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


def test_a_symlink_in_a_checkpoint_is_not_followed_when_it_is_packed(tmp_path: Path) -> None:
    world, store = linked(tmp_path)
    local = write_checkpoint(world.disk / "out", 10, files=trained(10))
    secret = world.disk / "secret"
    (local.path / "adapter.safetensors").rename(secret)
    (local.path / "adapter.safetensors").symlink_to(secret)
    with pytest.raises((Corrupt, InvalidName), match="symlink"):
        world.checkpoints.publish(local, 1, incarnation(1))
    assert store.puts == []
