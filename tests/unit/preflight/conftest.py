"""A dataset, and what is wrong with a sweep file beside it."""

from pathlib import Path

import pytest
from PIL import Image
from support.preflight import GRID, Check

from orchestrator.grid.sweep import load
from orchestrator.launching.preflight import check
from storage.memory import MemoryStore


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A dataset of four captioned images, beside which sweep files are written."""
    folder = tmp_path / "data"
    folder.mkdir()
    for index in range(4):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text("a caption")
    return folder


@pytest.fixture
def problems_of(data: Path) -> Check:
    """Check a sweep file; return its problems as "where code message"."""

    def problems(text: str = GRID, store: MemoryStore | None = None, **options: object) -> list[str]:
        file = data.parent / "grid.yaml"
        file.write_text(text)
        kept = store or MemoryStore("kept")
        found = check(load(file), kept, **options)  # type: ignore[arg-type]
        assert list(kept.list("")) == []
        return [f"{problem.where} {problem}" for problem in found]

    return problems
