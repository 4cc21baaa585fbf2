"""A dataset on this machine."""

from pathlib import Path

import pytest
from support.shared_content import FILES, written

from storage.content.store import LocalContent


@pytest.fixture
def local(tmp_path: Path) -> LocalContent:
    return written(tmp_path / "dataset", FILES)
