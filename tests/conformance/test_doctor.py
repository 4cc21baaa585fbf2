"""What ``orchestrate doctor`` says of real servers, healthy and ill, and that it leaves nothing behind."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support.fault_proxy import FaultProxy
from support.faults import FOREVER, Status, matching
from support.s3_servers import S3Server, free_ports

from orchestrator.cli import main
from orchestrator.commands.doctor import exit_code
from storage.doctor.examination import Cause, Check, examine
from storage.object_store import ObjectStore
from storage.url import open_store


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def proxy(rclone: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(rclone.endpoint) as proxy:
        yield proxy


def url_through(proxy: FaultProxy, server: S3Server, prefix: str) -> str:
    return server.url_of(prefix).replace(server.endpoint, proxy.endpoint)


def by_name(found: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in found}


def readable(store: ObjectStore) -> list[str]:
    """After a race rclone may list for minutes what is deleted, and what nobody can read."""
    return [info.key for info in store.list("") if store.head(info.key) is not None]


def doctor(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["doctor", *arguments])


def test_a_healthy_server_will_do_and_is_left_as_it_was(s3_server: S3Server) -> None:
    url = s3_server.url_of("healthy")
    found = by_name(list(examine(url)))

    assert [(name, check.said) for name, check in found.items() if check.ok is not True] == []
    assert found["multipart"].said == "works; an unfinished upload was listed, and aborted"
    assert "refuses a body that does not fit" in found["checksums"].said
    secure = s3_server.endpoint.startswith("https:")
    trailers = "answered with 411 MissingContentLength over https" if secure else "taken over http"
    assert f"checksum trailers, is {trailers}" in found["checksums"].said
    assert found["throughput"].figures["up_bytes_per_s"] > 0
    store = open_store(url)
    assert readable(store) == []
    assert list(store.unfinished("")) == []


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("radosgw", "direct: one winner of 16 in each of 8 races"),
        ("rclone", "arbitrated: 1"),
        ("swift", "arbitrated: "),
    ],
)
def test_it_says_how_logs_will_be_written(kind: str, said: str, request: pytest.FixtureRequest) -> None:
    server: S3Server = request.getfixturevalue(kind)
    assert by_name(list(examine(server.url_of("how"))))["create-only"].said.startswith(said)


def test_without_the_right_to_delete_little_is_written_and_what_is_left_is_named(
    rclone: S3Server, proxy: FaultProxy
) -> None:
    proxy.inject(Status(403, "AccessDenied"), when=matching("DELETE"), times=FOREVER)
    found = list(examine(url_through(proxy, rclone, "no-delete")))
    named = by_name(found)

    assert named["write and read"].ok
    assert (named["delete"].ok, named["delete"].cause) == (False, Cause.DENIED)
    assert "403 AccessDenied" in named["delete"].said
    assert "put, get, list and delete" in named["delete"].todo
    assert {name for name, check in named.items() if check.said == "not tried, because of 'delete'"} == {
        "create-only",
        "multipart",
        "checksums",
        "latency",
        "throughput",
    }
    assert exit_code(found) == 5
    store = open_store(rclone.url_of("no-delete"))
    left = [info.key for info in store.list("")]
    prefix = named["clean up"].todo.split()[4]
    assert left
    assert all(key.startswith(prefix) for key in left)


def test_an_examination_that_is_stopped_leaves_nothing(rclone: S3Server) -> None:
    url = rclone.url_of("stopped")
    examination = examine(url)
    for check in examination:
        if check.name == "delete":
            break
    assert list(open_store(url).list(""))
    examination.close()  # type: ignore[attr-defined]
    assert list(open_store(url).list("")) == []


@pytest.mark.parametrize(
    ("ahead_s", "ok", "said"),
    [
        (3600.0, False, "s ahead of the server's"),
        (-3600.0, False, "s behind the server's"),
        (100.0, True, "s ahead of the server's"),
    ],
)
def test_a_clock_that_is_wrong_is_told_from_the_servers(
    rclone: S3Server, ahead_s: float, ok: bool, said: str
) -> None:
    found = by_name(list(examine(rclone.url_of("clock"), now=lambda: time.time() + ahead_s)))
    assert (found["clock"].ok, said in found["clock"].said) == (ok, True)
    assert "set this machine's clock" in found["clock"].todo


def test_a_server_that_refuses_our_clock_still_tells_it(rclone: S3Server, proxy: FaultProxy) -> None:
    answer = Status(403, "RequestTimeTooSkewed", {"Date": "Thu, 01 Jan 2015 00:00:00 GMT"})
    proxy.inject(answer, times=FOREVER)
    found = by_name(list(examine(url_through(proxy, rclone, "skewed"))))
    assert "set this machine's clock" in found["reach"].said
    assert found["clock"].ok is False
    assert "ahead of the server's" in found["clock"].said


def test_uploads_that_a_server_does_not_list_are_a_warning(rclone: S3Server, proxy: FaultProxy) -> None:
    proxy.inject(Status(501, "NotImplemented"), when=matching("GET", "uploads"), times=FOREVER)
    found = list(examine(url_through(proxy, rclone, "unlisted")))
    assert by_name(found)["multipart"].ok is True
    assert "lifecycle rule" in by_name(found)["multipart"].todo
    assert exit_code(found) == 0


def test_nobody_there_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "TESTACCESSKEY001")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testsecretkey0001")
    result = doctor("--storage", f"s3://loras?endpoint=http://127.0.0.1:{free_ports(1)[0]}", "-o", "json")
    assert result.exit_code == 6
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert (checks["reach"]["ok"], checks["reach"]["cause"]) == (False, "unreachable")
    assert "check the endpoint" in checks["reach"]["todo"]
    assert checks["create-only"]["ok"] is None
    assert checks["disk"]["ok"] is True


def test_a_bucket_that_is_not_there_is_said(s3_server: S3Server) -> None:
    result = doctor("--storage", f"s3://no-such-bucket?endpoint={s3_server.endpoint}")
    assert result.exit_code == 5
    assert "create the bucket first" in result.stdout


def test_a_wrong_secret_is_denied_and_not_shown(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret-0001")
    result = doctor("--storage", s3_server.url)
    assert result.exit_code == 5
    assert "check the bucket's name and the credentials" in result.stdout
    assert "wrong-secret" not in result.output
