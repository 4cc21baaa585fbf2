"""Digests that are remembered: never of bytes that may have changed."""

import json
import os
from pathlib import Path

from storage.content import hashing
from storage.content.hashing import hashed

LONG_AGO = 1_000_000_000


def write(path: Path, body: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body)
    return path


def test_a_file_is_read_once_while_its_entry_stays_the_same(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    path, memory = write(tmp_path / "sd.safetensors", b"weights"), tmp_path / "memory"
    monkeypatch.setattr(hashing, "RACY_NS", -(10**18))  # as if it had been written long ago
    first = hashed("", {"sd.safetensors": path}, memory)
    reads: list[Path] = []
    monkeypatch.setattr(hashing, "_sha256", lambda path: reads.append(path) or "f" * 64)

    assert hashed("", {"sd.safetensors": path}, memory).digest == first.digest
    assert reads == []
    write(path, b"WEIGHTS")
    os.utime(path, (LONG_AGO, LONG_AGO))
    assert hashed("", {"sd.safetensors": path}, memory).listing.files[0].sha256 == "f" * 64
    assert reads == [path]


def test_a_file_that_was_just_written_is_read_again(tmp_path: Path) -> None:
    path, memory = write(tmp_path / "a.png", b"one"), tmp_path / "memory"
    hashed("", {"a.png": path}, memory)

    for file in memory.glob("*.json"):
        assert json.loads(file.read_bytes()) == {}


def test_a_damaged_memory_costs_time_only(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    path, memory = write(tmp_path / "a.png", b"one"), tmp_path / "memory"
    monkeypatch.setattr(hashing, "RACY_NS", -(10**18))
    first = hashed("", {"a.png": path}, memory)
    for file in memory.glob("*.json"):
        for damage in (b"{", b"[]", b'{"a": {"b": "c"}}', b"\xff"):
            file.write_bytes(damage)
            assert hashed("", {"a.png": path}, memory) == first


def test_a_memory_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", b"one")
    assert hashed("", {"a.png": path}, path / "not a folder").digest == hashed("", {"a.png": path}).digest
