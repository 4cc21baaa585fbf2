"""A store in a folder: what writers that died have left behind."""

import os
import time
from pathlib import Path

from storage.directory import LITTER_S, DirectoryStore


def test_what_a_dead_writer_left_is_removed_by_the_first_write_a_day_later(tmp_path: Path) -> None:
    DirectoryStore(tmp_path).put("a", b"makes the folder")
    staging = tmp_path / ".tmp"
    (staging / "left").write_bytes(b"half a checkpoint")
    (staging / "in use").write_bytes(b"half of another")
    long_ago = time.time() - LITTER_S - 60
    os.utime(staging / "left", (long_ago, long_ago))

    reader = DirectoryStore(tmp_path)
    assert reader.get("a") == b"makes the folder"
    assert sorted(os.listdir(staging)) == ["in use", "left"]
    DirectoryStore(tmp_path).create("b", b"anything")
    assert os.listdir(staging) == ["in use"]
