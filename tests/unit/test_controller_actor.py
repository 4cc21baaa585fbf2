"""The start of a controller's actor, whatever goes wrong. No cluster is started."""

import threading
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError
from support.fake_cluster import small_sweep

from orchestrator.errors import OrchestrateError
from orchestrator.grid.submission import submit
from orchestrator.on_ray import controller_actor
from orchestrator.on_ray.controller_actor import ControllerActor, ControllerSetup
from orchestrator.on_ray.controller_client import ControllerClient
from orchestrator.on_ray.granting import Unenforced
from storage import layout
from storage.directory import DirectoryStore
from storage.url import open_store


def actor_of(url: str, *, restarted: bool) -> ControllerActor:
    """An actor as its constructor leaves it, without Ray and before its thread begins."""
    actor = ControllerActor.__new__(ControllerActor)
    actor._setup = ControllerSetup(sweep="cat", store_url=url, arbitrated=False, scoped=True)
    actor._cluster = actor._controller = actor._desk = actor._failure = None
    actor._ready = threading.Event()
    actor._handle = "this actor"
    actor._address = "10.0.0.1:6379"
    actor._restarted = restarted
    return actor


@pytest.mark.parametrize("error", [RuntimeError("not ready"), OrchestrateError("not ready")])
def test_an_actor_that_cannot_start_says_why_and_goes(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor = actor_of("memory://x", restarted=False)

    def cannot() -> Any:
        raise error

    killed: list[Any] = []
    monkeypatch.setattr(actor, "_prepare", cannot)
    monkeypatch.setattr(controller_actor.ray, "kill", killed.append)
    monkeypatch.setattr(controller_actor, "LINGER_S", 0.0)
    actor._run()
    assert "not ready" in str(actor.failure())
    with pytest.raises(OrchestrateError, match="not ready"):
        actor.cancel([])
    assert killed == ["this actor"]


class Began(Exception):
    """The check of the store was passed."""


def test_only_the_first_start_of_a_scoped_sweep_ends_on_what_its_store_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = tmp_path.as_uri()
    store = open_store(url)
    assert isinstance(store, DirectoryStore)
    submit(small_sweep(), store)
    answers: list[Exception] = []

    def check(store: object) -> None:
        if answers:
            raise answers.pop(0)

    def begun(*_: object) -> None:
        raise Began

    monkeypatch.setattr(controller_actor, "check_store", check)
    monkeypatch.setattr(controller_actor, "RayCluster", begun)
    monkeypatch.setattr(controller_actor, "RETRY_S", 0.0)

    answers[:] = [Unenforced("it refuses a granted write, with status 400")]
    with pytest.raises(Unenforced):
        actor_of(url, restarted=False)._prepare()
    answers[:] = [Unenforced("it refuses a granted write, with status 400")] * 3
    with pytest.raises(Began):
        actor_of(url, restarted=True)._prepare()
    assert answers == []
    assert len(list(store.list(layout.terms_prefix("cat")))) == 1, "office is taken once"


@pytest.mark.parametrize(
    ("error", "asked", "code"),
    [
        (GetTimeoutError("no answer for 60 s"), "setup", 7),
        (GetTimeoutError("no answer for 60 s"), "failure", 1),  # it lives: it has said its setup
        (ActorDiedError(), "setup", 1),
    ],
)
def test_only_a_controller_that_keeps_silent_is_said_not_to_answer(
    error: Exception, asked: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With code 7 a supervisor may end the head, and with it all that trains."""

    def get(reference: object, timeout: float) -> None:
        raise error

    monkeypatch.setattr("ray.get", get)
    with pytest.raises(OrchestrateError) as raised:
        getattr(ControllerClient(MagicMock(), "cat"), asked)()
    assert raised.value.exit_code == code
