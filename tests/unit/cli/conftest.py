"""A folder in which commands run, with no cluster: a command that would start one fails its test."""

from pathlib import Path

import pytest
from PIL import Image
from support.command_line import GRID, Orchestrate, invoke

from storage.directory import DirectoryStore


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands run: an empty store, a sweep file with its data, and no cluster."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ORCHESTRATE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ORCHESTRATE_STORE", "file://./store")
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("orchestrator.on_ray.local_ray.start", started_a_cluster)
    monkeypatch.setattr("orchestrator.on_ray.local_ray.connect", started_a_cluster)
    (tmp_path / "data").mkdir()
    for index in range(4):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / "data" / f"{index}.png")
        (tmp_path / "data" / f"{index}.txt").write_text("a cat")
    (tmp_path / "grid.yaml").write_text(GRID)
    return tmp_path


def started_a_cluster(*arguments: object) -> None:
    raise AssertionError("a Ray cluster was started or asked for")


@pytest.fixture
def orchestrate(folder: Path) -> Orchestrate:
    """Runs a command in the folder."""
    return invoke


@pytest.fixture
def store(folder: Path) -> DirectoryStore:
    return DirectoryStore(folder / "store")
