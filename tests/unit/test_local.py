"""Checkpoint directories appear whole, are verified byte for byte, and half-written ones never show."""

import errno
import math
import os
from pathlib import Path

import pytest
from support.open_files import no_files_to_open
from support.runs import contents, read_files, write_checkpoint

from storage import local
from storage.errors import Corrupt, InvalidName
from storage.local import (
    complete_checkpoints,
    newest_first,
    read_checkpoint,
    remove,
    remove_stale,
    staged_checkpoint,
    verify,
)


def test_a_checkpoint_appears_complete_with_sizes_and_digests(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path, 100)

    assert written.path == tmp_path / "step-000000100"
    assert read_files(written.path) == contents(100)
    assert [f.name for f in written.manifest.files] == ["adapter.safetensors", "state/optimizer.safetensors"]
    assert (written.step, written.final, written.manifest.metrics) == (100, False, {"loss": 1 / 101})
    verify(written.path, written.manifest.files)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000100"]


def test_a_checkpoint_is_invisible_while_it_is_written(tmp_path: Path) -> None:
    with staged_checkpoint(tmp_path, 1, metrics={}, final=False) as directory:
        (directory / "a").write_bytes(b"x")
        assert complete_checkpoints(tmp_path) == []
    assert [c.step for c in complete_checkpoints(tmp_path)] == [1]


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with staged_checkpoint(tmp_path, 1, metrics={}, final=False) as directory:
            (directory / "a").write_bytes(b"x")
            raise RuntimeError("out of ink")

    with pytest.raises(RuntimeError, match="out of ink"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_metrics_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    metrics = {"loss": 0.5, "nan": math.nan, "inf": math.inf}
    with staged_checkpoint(tmp_path, 1, metrics=metrics, final=True):
        pass
    (checkpoint,) = complete_checkpoints(tmp_path)
    assert checkpoint.manifest.metrics == {"loss": 0.5}
    assert checkpoint.final


def test_complete_checkpoints_are_newest_first(tmp_path: Path) -> None:
    for step in (5, 1000, 20):
        write_checkpoint(tmp_path, step)
    assert [c.step for c in complete_checkpoints(tmp_path)] == [1000, 20, 5]
    assert complete_checkpoints(tmp_path / "nowhere") == []


def test_what_is_no_complete_checkpoint_is_skipped(tmp_path: Path) -> None:
    good = write_checkpoint(tmp_path, 1)
    manifest = (good.path / "manifest.json").read_text()
    for name, text in {
        "step-000000002": None,
        "step-000000003": "",
        "step-000000004": '{"version":1',
        "step-000000005": manifest,  # says step 1
        "step-000000006": manifest.replace('"step":1', '"step":6').replace('"version":1', '"version":2'),
        "step-7": manifest.replace('"step":1', '"step":7'),
        ".tmp-0123456789abcdef": manifest,
    }.items():
        (tmp_path / name).mkdir()
        if text is not None:
            (tmp_path / name / "manifest.json").write_text(text)
    (tmp_path / "step-000000008").write_text("a file")
    (tmp_path / "step-000000010" / "manifest.json").mkdir(parents=True)
    (tmp_path / "step-000000011").mkdir()
    os.mkfifo(tmp_path / "step-000000011" / "manifest.json")
    (tmp_path / "step-000000009").symlink_to(good.path)

    assert complete_checkpoints(tmp_path) == [good]


def test_a_checkpoint_of_the_same_step_is_replaced_unless_it_is_the_same(tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path, 1)
    inode = first.path.stat().st_ino

    assert write_checkpoint(tmp_path, 1) == first
    assert first.path.stat().st_ino == inode, "the same bytes again change nothing"

    write_checkpoint(tmp_path, 1, files={"other": b"x"})
    assert read_files(first.path) == {"other": b"x"}
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001"]


def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_none(tmp_path: Path) -> None:
    good = write_checkpoint(tmp_path, 1)
    with no_files_to_open(), pytest.raises(OSError, match="Too many open files"):
        read_checkpoint(good.path)
    assert complete_checkpoints(tmp_path) == [good]


def test_one_that_cannot_be_read_hides_no_newer_one_and_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = write_checkpoint(tmp_path, 1), write_checkpoint(tmp_path, 2)
    readable = Path.read_bytes

    def read(path: Path) -> bytes:
        if path.parent == bad.path:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return readable(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    assert next(newest_first(tmp_path)) == good
    with pytest.raises(OSError, match="Input/output error"):
        complete_checkpoints(tmp_path)

    with staged_checkpoint(tmp_path, 1, metrics={}, final=False) as directory:
        (directory / "other").write_bytes(b"x")
    monkeypatch.undo()
    assert read_files(bad.path) == {"other": b"x"}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "899 bytes, its record says 900"),
        (
            lambda path: path.write_bytes(b"X" + path.read_bytes()[1:]),
            "sha256 is [0-9a-f]{12}, its record says",
        ),
        (lambda path: path.unlink(), "No such file"),
        (lambda path: (path.unlink(), path.mkdir()), "not a regular file"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "not a regular file"),
        (lambda path: (path.rename(path.with_name("moved")), path.symlink_to("moved")), "no symlinks"),
    ],
)
def test_damage_is_found_and_named(tmp_path: Path, damage, reason: str) -> None:  # type: ignore[no-untyped-def]
    checkpoint = write_checkpoint(tmp_path, 1, files={"adapter.safetensors": b"weights10" * 100})
    damage(checkpoint.path / "adapter.safetensors")
    with pytest.raises(Corrupt, match=f"adapter.safetensors.*{reason}"):
        verify(checkpoint.path, checkpoint.manifest.files)


def test_a_symlinked_directory_is_not_followed_when_verifying(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "root", 1)
    (checkpoint.path / "state").rename(tmp_path / "elsewhere")
    (checkpoint.path / "state").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Corrupt, match="no symlinks"):
        verify(checkpoint.path, checkpoint.manifest.files)


@pytest.mark.parametrize("make", [lambda p: p.symlink_to("/etc/passwd"), os.mkfifo])
def test_symlinks_and_devices_are_refused_in_a_new_checkpoint(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    with (
        pytest.raises(InvalidName, match="regular files only"),
        staged_checkpoint(tmp_path, 1, metrics={}, final=False) as directory,
    ):
        make(directory / "x")
    assert list(tmp_path.iterdir()) == []


def test_stale_temporary_directories_are_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = write_checkpoint(tmp_path, 1)
    local.temporary_dir(tmp_path).joinpath("half").write_bytes(b"x")
    remove_stale(tmp_path)
    assert list(tmp_path.iterdir()) == [kept.path]
    remove_stale(tmp_path / "nowhere")


def test_a_removed_checkpoint_is_gone_at_once_and_removing_it_twice_is_fine(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 1)
    remove(checkpoint.path)
    remove(checkpoint.path)
    assert list(tmp_path.iterdir()) == []
    assert read_checkpoint(checkpoint.path) is None
