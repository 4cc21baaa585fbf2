"""A tiny base model, images, and directories of runs to train there; and a folder that is fast to write."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from support.training import Lay

    from trainer.config import RunSpec
    from trainer.rundir import RunDir

# A machine may be as slow as it likes: an example that takes long shows nothing.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture
def disk_in_memory() -> Iterator[Path]:
    """A folder, in memory where there is such a thing: a store in a folder flushes all that it is given."""
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=shm) as directory:
        yield Path(directory)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``world`` is a copy of."""
    from support.tiny_world import build_base, build_images  # here: most tests need no torch

    root = tmp_path_factory.mktemp("built")
    build_base(root / "base")
    build_images(root / "images")
    return root


@pytest.fixture(scope="module")
def world(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``base`` and ``images``, for one module to do with as it likes."""
    return shutil.copytree(built, tmp_path_factory.mktemp("world"), dirs_exist_ok=True)


@pytest.fixture
def lay(world: Path, tmp_path: Path) -> "Lay":
    """Lays out the directory of a run of this name and spec, ready to be trained."""
    from support.training import lay_out

    def make(name: str, spec: "RunSpec", **options: Any) -> "RunDir":
        return lay_out(tmp_path / name, spec, cache=world / "cache", **options)

    return make
