"""A sweep in a folder whose file times tell its age, and the commands that look after it."""

import uuid
from pathlib import Path

import pytest
from support.cleaning import CAT, R0
from support.command_line import Orchestrate, invoke
from support.runs import claimed, ended, incarnation, write_checkpoint

from orchestrator.grid.submission import submit
from storage import layout
from storage.checkpoints import CheckpointStore
from storage.directory import DirectoryStore
from storage.log import run_log


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
    submit(CAT, store)
    log = run_log(store, R0)
    checkpoints = CheckpointStore(store, R0, log)
    log.append(claimed())
    for step in (10, 20):
        checkpoints.publish(write_checkpoint(tmp_path / "out", step), 1, incarnation(1))
    store.put(layout.checkpoint_file(R0, 1, incarnation(1), 30, "half"), b"x" * 1000)
    log.append(ended())
    log.append(claimed(2))
    for step in (30, 40, 50):
        checkpoints.publish(write_checkpoint(tmp_path / "out", step), 2, incarnation(2))
    store.put(layout.log_text_key(R0, 1, 0), b"epoch 1\n")
    store.put(f"probe/{uuid.UUID(int=1)}/0", b"left by a probe that died")
    return store


@pytest.fixture
def orchestrate(store: DirectoryStore) -> Orchestrate:
    """Runs a command beside the store."""
    return invoke
