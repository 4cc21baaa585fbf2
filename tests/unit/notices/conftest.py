"""Where the played services of the clouds are told what to tell."""

from pathlib import Path

import pytest


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "notice.json"
