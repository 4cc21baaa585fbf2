"""Publishing: a checkpoint exists exactly when its record says so, and holds what its manifest says."""

from pathlib import Path

import pytest
from support.open_files import no_files_to_open
from support.runs import RUN, claimed, contents, ended, incarnation, read_files, write_checkpoint
from support.stored_run import World, linked, trained

from storage import layout
from storage.checkpoints import CheckpointStore
from storage.errors import Corrupt, Fenced, InvalidName, Unavailable
from storage.local import LocalCheckpoint, Manifest, complete_checkpoints, staged_checkpoint, verify
from storage.log import run_log
from storage.memory import MemoryStore
from storage.records import StoredFile


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
