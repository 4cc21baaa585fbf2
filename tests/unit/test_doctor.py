"""What ``orchestrate doctor`` says of a folder, and of stores that fail in ways no real server here does."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from orchestrator.cli import main
from orchestrator.commands.doctor import exit_code, lines, verdict
from storage.directory import DirectoryStore
from storage.doctor import checks as doctor_checks
from storage.doctor import examination as doctor
from storage.doctor.checks import judged_skew
from storage.doctor.examination import Cause, Check, examine
from storage.errors import AccessDenied, StorageError, Unavailable


def check(ok: bool | None = True, cause: Cause | None = None, todo: str = "") -> Check:
    return Check(name="x", ok=ok, said="said", cause=cause, todo=todo)


def by_name(found: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in found}


def test_a_folder_is_examined_and_what_does_not_apply_is_skipped(tmp_path: Path) -> None:
    found = by_name(list(examine(str(tmp_path / "store"))))

    assert {name for name, check in found.items() if check.ok is None} == {"clock", "multipart", "checksums"}
    assert {name for name, check in found.items() if check.ok is False} == set()
    assert "one winner" in found["create-only"].said
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []


def test_the_command_prints_one_object_or_a_line_each(tmp_path: Path) -> None:
    as_json = CliRunner().invoke(main, ["doctor", "--storage", str(tmp_path / "s"), "-o", "json"])
    assert as_json.exit_code == 0
    told = json.loads(as_json.stdout)
    assert (told["schema"], told["ok"]) == (1, True)
    assert told["store"] == (tmp_path / "s").as_uri()

    as_text = CliRunner().invoke(main, ["doctor", "--store", str(tmp_path / "s")])
    assert as_text.exit_code == 0
    assert len(as_text.stdout.splitlines()) == len(told["checks"])
    assert "The store will do." in as_text.stderr


def test_a_url_that_is_none_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["doctor", "--storage", "ftp://x/y"])
    assert result.exit_code == 2
    assert "'ftp'" in result.stderr


@pytest.mark.parametrize(
    ("error", "todo"),
    [
        (Unavailable("x: No such file or directory"), "name a folder"),
        (AccessDenied("x: Operation not permitted"), "name a folder"),
    ],
)
def test_of_a_folder_nothing_is_said_of_endpoints_and_credentials(
    error: StorageError, todo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(DirectoryStore):
        def put(self, key: str, body: bytes | Path) -> None:
            raise error

    monkeypatch.setattr(doctor, "open_store", lambda url: Failing(tmp_path / "store"))
    assert by_name(list(examine("unused")))["write and read"].todo.startswith(todo)


def test_a_bucket_that_is_not_there_is_to_be_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoBucket(DirectoryStore):
        url = "s3://loras"

        def list(self, prefix: str, after: str = ""):  # type: ignore[no-untyped-def]
            raise AccessDenied("s3://loras: the store answered 404 NoSuchBucket: create the bucket first")

    monkeypatch.setattr(doctor, "open_store", lambda url: NoBucket(tmp_path / "store"))
    monkeypatch.setattr(doctor, "_PLAN", doctor._PLAN[:1])
    assert by_name(list(examine("unused")))["reach"].todo.startswith("create the bucket, or correct its name")


def test_a_disk_without_room_for_two_checkpoints_is_wrong(tmp_path: Path) -> None:
    found = list(examine(str(tmp_path / "store"), checkpoint_bytes=10**15))
    assert by_name(found)["disk"].ok is False
    assert "TMPDIR" in by_name(found)["disk"].todo
    assert exit_code(found) == 3


def test_a_listing_that_lags_behind_is_found_and_the_rest_still_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lagging(DirectoryStore):
        def list(self, prefix: str, after: str = ""):  # type: ignore[no-untyped-def]
            return iter(())

    monkeypatch.setattr(doctor, "open_store", lambda url: Lagging(tmp_path / "store"))
    found = list(examine("unused"))
    assert by_name(found)["list after write"].ok is False
    assert "a listing does not show it" in by_name(found)["list after write"].said
    assert by_name(found)["create-only"].ok is True
    assert exit_code(found) == 3


def test_a_store_that_returns_other_bytes_is_not_examined_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Forgetful(DirectoryStore):
        def get(self, key: str) -> bytes:
            return b""

    monkeypatch.setattr(doctor, "open_store", lambda url: Forgetful(tmp_path / "store"))
    found = by_name(list(examine("unused")))
    assert found["write and read"].ok is False
    assert found["create-only"].ok is None
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []


def test_on_a_slow_link_the_measurement_ends_with_a_small_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_checks, "TRANSFER_S", 0.0)
    found = by_name(list(examine(str(tmp_path / "store"))))
    assert found["throughput"].figures["measured_bytes"] == doctor_checks.TRANSFER_SIZES[0]


@pytest.mark.parametrize(
    ("ahead_s", "ok", "warned"),
    [(0, True, False), (-30, True, False), (31, True, True), (-300, True, True), (301, False, True)],
)
def test_half_a_minute_is_a_warning_and_five_are_wrong(ahead_s: float, ok: bool, warned: bool) -> None:
    found = judged_skew(ahead_s)
    assert (found.ok, bool(found.todo)) == (ok, warned)


@pytest.mark.parametrize(
    ("found", "code"),
    [
        ([], 0),
        ([check(), check(None), check(todo="a warning")], 0),
        ([check(False, Cause.UNREACHABLE)], 6),
        ([check(False, Cause.DENIED), check(False, Cause.DENIED)], 5),
        ([check(False, Cause.DENIED), check(False, Cause.WRONG)], 3),
        ([check(False, Cause.WRONG)], 3),
    ],
)
def test_one_exit_code_says_what_kind_of_thing_is_wrong(found: list[Check], code: int) -> None:
    assert exit_code(found) == code


def test_each_line_says_how_it_is_and_what_to_do() -> None:
    assert [str(line) for line in lines(check(False, Cause.WRONG, "do it"))] == [
        f"{'WRONG':<8}{'x':<17}said",
        f"{'':<25}→ do it",
    ]
    assert str(lines(check(todo="do it"))[0]).startswith("warning ")
    assert verdict([check(False), check()]) == "1 of 2 checks failed."
    assert verdict([check(todo="do it")]) == "The store will do, with 1 warning(s)."
