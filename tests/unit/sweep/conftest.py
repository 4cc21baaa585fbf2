"""A sweep file beside its dataset."""

from pathlib import Path

import pytest
from support.sweep_file import GRID, Write


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a sweep file beside a small dataset folder; return its path."""
    folder = tmp_path / "here"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "a.png").write_bytes(b"pixels")
    (folder / "data" / "a.txt").write_text("a caption")

    def write_file(text: str = GRID, name: str = "my_Grid.yaml") -> Path:
        (folder / name).write_text(text)
        return folder / name

    return write_file
