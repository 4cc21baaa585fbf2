"""Fixtures of the end-to-end tests, and the figures that ``make e2e`` prints as its last line."""

import atexit
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.s3_servers import S3Server, radosgw_server, rclone_server, why_no_radosgw
from support.tiny_world import build_base, build_images

FIGURES: dict[str, Any] = {}

# One token for every cluster of the session, set before Ray is imported: a process reads it only once.
_descriptor, _token = tempfile.mkstemp(prefix="ray-token-")
with os.fdopen(_descriptor, "w") as _file:
    _file.write(secrets.token_hex(32))
atexit.register(os.unlink, _token)
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN_PATH"] = _token


@pytest.fixture(scope="session")
def figures() -> dict[str, Any]:
    """What the tests measured; printed at the end."""
    return FIGURES


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In a process of several: leave the figures for the one that prints them."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["figures"] = FIGURES


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    FIGURES.update(getattr(node, "workeroutput", {}).get("figures", {}))


def pytest_unconfigure(config: pytest.Config) -> None:
    if FIGURES and not hasattr(config, "workeroutput"):
        print(json.dumps(FIGURES))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base model and a few images."""
    root = tmp_path_factory.mktemp("world")
    build_base(root / "base")
    build_images(root / "images", count=10)
    return root


@pytest.fixture(scope="session")
def bucket(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server, with its credentials in the environment. Parameter: its kind."""
    start = {"rclone": rclone_server, "radosgw": radosgw_server}[request.param]
    if request.param == "radosgw" and (reason := why_no_radosgw()):
        pytest.skip(reason)
    with (
        start(tmp_path_factory.mktemp(request.param)) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server
