"""What a node makes of the answers, and who holds the keys. No server takes part."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.scoped import ME, STATE

from orchestrator.commands.session import refuse_unrunnable
from orchestrator.errors import InvalidFile, PreflightFailed
from orchestrator.grid.sweep import load
from orchestrator.launching.launch import start
from orchestrator.on_ray.agent import forget_credentials
from storage.errors import AccessDenied, Corrupt, Fenced, InvalidName, StorageError, Unavailable
from storage.memory import MemoryStore
from storage.probe import ProbeResult
from storage.scoped.grants import REPLY, REQUEST, Granted, Read, Refused, Request, Told, refused
from storage.scoped.store import ScopedLedger, ScopedStore


@pytest.mark.parametrize("kind", [AccessDenied, Corrupt, Fenced, InvalidName, Unavailable])
def test_a_refusal_arrives_as_the_error_that_it_was(kind: type[StorageError]) -> None:
    ledger = ScopedLedger(lambda body: REPLY.dump_json(refused(kind("why"))), ME)
    with pytest.raises(kind, match="why"):
        ledger.refresh()


def test_a_state_arrives_as_it_was() -> None:
    assert ScopedLedger(lambda body: REPLY.dump_json(Told(state=STATE)), ME).refresh() == STATE


@pytest.mark.parametrize("reply", [b"", b"{}", b"[]", b'{"reply": "granted"}', b'{"reply": "done", "x": 1}'])
def test_a_reply_that_is_none_is_waited_out(reply: bytes) -> None:
    with pytest.raises(Unavailable):
        ScopedLedger(lambda body: reply, ME).refresh()


def test_every_request_says_who_asks() -> None:
    asked: list[Request] = []

    def ask(body: bytes) -> bytes:
        asked.append(REQUEST.validate_json(body))
        return REPLY.dump_json(Refused(error="AccessDenied", reason="no"))

    with pytest.raises(AccessDenied):
        ScopedStore("s3://b", ask, ME).get("a/key")
    assert asked == [Request(caller=ME, asked=Read(key="a/key"))]


def test_a_node_never_lists_deletes_or_makes_log_entries() -> None:
    def never(body: bytes) -> bytes:
        raise AssertionError("it is not even asked for")

    store = ScopedStore("s3://b", never, ME)
    refused_calls: list[Callable[[], object]] = [
        lambda: store.list("runs/"),
        lambda: store.delete(["a"]),
        lambda: store.create("a", b""),
        lambda: store.abort_uploads("runs/"),
        lambda: store.unfinished("runs/"),
    ]
    for call in refused_calls:
        with pytest.raises(AccessDenied, match="scoped node may not"):
            call()


def test_a_grant_never_shows_itself() -> None:
    granted = Granted(url="https://s/?X-Amz-Signature=abc", headers={"Content-MD5": "xyz"})
    assert "abc" not in f"{granted!r} {granted}"
    assert "xyz" not in repr(granted)


def test_an_agent_forgets_credentials_and_what_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_CA_BUNDLE"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "x")
    forget_credentials()
    assert {name for name in os.environ if name.startswith("AWS_")} == {"AWS_CA_BUNDLE"}


GRID = """
parameters: {{seed: {{values: [1]}}}}
base: {{model: owner/name}}
dataset: {{path: images}}
storage: {{url: "{url}", credentials: {credentials}}}
"""


@pytest.mark.parametrize(
    ("url", "credentials", "code"),
    [
        ("s3://bucket", "scoped", None),
        ("s3://bucket", "env", None),
        ("file:///srv/loras", "env", None),
        ("file:///srv/loras", "scoped", "E2125"),
        ("s3://bucket", "stolen-secret", "E2120"),
    ],
)
def test_a_sweep_file_says_who_holds_the_keys(
    url: str, credentials: str, code: str | None, tmp_path: Path
) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text(GRID.format(url=url, credentials=credentials))
    if code is None:
        assert load(file).storage.credentials == credentials
        return
    with pytest.raises(InvalidFile, match=code):
        load(file)


def test_a_store_without_create_only_is_refused_before_anything_starts(tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text(GRID.format(url="s3://bucket", credentials="scoped"))
    with pytest.raises(PreflightFailed, match="E2605"):
        start(load(file), "s3://bucket", arbitrated=True)
    with pytest.raises(PreflightFailed, match="E2605"):  # and no cluster is asked for
        refuse_unrunnable(
            load(file), MemoryStore(), ProbeResult(False, "races"), address="127.0.0.1:1", insecure=False
        )
