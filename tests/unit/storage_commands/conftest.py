"""A sweep in a folder whose file times tell its age, and the commands that look after it."""

import uuid
from pathlib import Path

import pytest
from support.cleaning import CAT, R0, lived
from support.command_line import Orchestrate, invoke

from storage import layout
from storage.directory import DirectoryStore


@pytest.fixture
def tmp_path(disk_in_memory: Path) -> Path:
    return disk_in_memory


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DirectoryStore:
    """A sweep of two runs: one trains, with four checkpoints and a node lost; the other was never claimed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ORCHESTRATE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ORCHESTRATE_STORE", "file://./store")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    store = DirectoryStore(tmp_path / "store")
    lived(store, CAT, tmp_path)
    store.put(layout.log_text_key(R0, 1, 0), b"epoch 1\n")
    store.put(f"probe/{uuid.UUID(int=1)}/0", b"left by a probe that died")
    return store


@pytest.fixture
def orchestrate(store: DirectoryStore) -> Orchestrate:
    """Runs a command beside the store."""
    return invoke
