"""A run in a store, whose first attempt is running."""

from pathlib import Path

import pytest
from support.stored_run import World, begun_in

from storage.memory import MemoryStore


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A run whose first attempt is running."""
    return begun_in(MemoryStore(), tmp_path, clock=lambda: 7.0)
