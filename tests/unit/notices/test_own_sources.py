"""Notices of one's own: a file, a URL, a command."""

import contextlib
import os
import stat
import sys
import time
from pathlib import Path

import psutil
import pytest
from support.fake_metadata import announce, metadata_service

from orchestrator.notices.metadata import Unreachable
from orchestrator.notices.notice import Kind, Notice
from orchestrator.notices.own import Command, File, Url, said


def test_a_file_is_a_notice_while_it_is_there(tmp_path: Path) -> None:
    path = tmp_path / "ending"
    source = File(path)
    assert source.poll() is None
    path.write_text("")
    assert source.poll() == Notice(kind=Kind.TERMINATE, source=f"file {path}")
    path.write_text("45\n")
    os.utime(path, (time.time() - 15, time.time() - 15))
    aged = source.poll()
    path.unlink()

    assert source.poll() is None
    assert aged is not None
    assert aged.left_s is not None
    assert -30 < aged.left_s <= 30


def test_a_url_is_asked(state: Path) -> None:
    with metadata_service("url", state) as service:
        assert Url(service.url).poll() is None
        announce(state, 30)
        notice = Url(service.url).poll()
        service.broken = True
        with pytest.raises(Unreachable):
            Url(service.url).poll()
    assert notice is not None
    assert notice.detail == "the host is sold"
    assert notice.left_s is not None
    assert 0 < notice.left_s <= 30


def script(path: Path, body: str) -> tuple[str, ...]:
    path.write_text(f"#!{sys.executable}\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return (str(path),)


def test_a_command_that_succeeds_is_a_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    tells = script(
        tmp_path / "tells",
        'import os; print(\'{"seconds": 20, "detail": "%s"}\' % os.environ.get(\'AWS_SECRET_ACCESS_KEY\'))',
    )
    denies = script(tmp_path / "denies", "raise SystemExit(1)")

    assert Command(tells).poll() == Notice(kind=Kind.TERMINATE, source=tells[0], left_s=20.0, detail="None")
    assert Command(denies).poll() is None
    with pytest.raises(Unreachable, match="cannot be started"):
        Command((str(tmp_path / "missing"),)).poll()


def test_what_a_command_leaves_behind_neither_delays_its_notice_nor_lives(tmp_path: Path) -> None:
    left = tmp_path / "left"
    leaves = ("bash", "-c", f"sleep 600 & echo $! > {left}; echo 30")
    assert Command(leaves).poll() == Notice(kind=Kind.TERMINATE, source="bash", left_s=30.0)
    pid = int(left.read_text())
    deadline = time.monotonic() + 30.0
    with contextlib.suppress(psutil.NoSuchProcess):
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_command_that_talks_much_is_heard(tmp_path: Path) -> None:
    talks = script(tmp_path / "talks", "print('gone ' * 200_000)")
    notice = Command(talks).poll()
    assert notice is not None
    assert notice.detail == ("gone " * 24)


def test_a_command_that_never_ends_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.notices.own.COMMAND_S", 0.2)
    with pytest.raises(Unreachable, match="did not end"):
        Command(script(tmp_path / "hangs", "import time; time.sleep(600)")).poll()


@pytest.mark.parametrize(
    ("text", "left_s", "detail", "kind"),
    [
        ("", None, "", Kind.TERMINATE),
        ("12.5\n", 12.5, "", Kind.TERMINATE),
        ("Infinity", None, "", Kind.TERMINATE),
        ("true", None, "True", Kind.TERMINATE),
        ('{"seconds": "soon", "kind": "maintenance"}', None, "", Kind.MAINTENANCE),
        ('{"seconds": 9, "kind": "party", "detail": 3}', 9.0, "3", Kind.TERMINATE),
        ("going\x1b[31m away", None, "going [31m away", Kind.TERMINATE),
        ("x" * 1000, None, "x" * 120, Kind.TERMINATE),
    ],
)
def test_whatever_is_said_is_a_notice(text: str, left_s: float | None, detail: str, kind: Kind) -> None:
    assert said(text, "here") == Notice(kind=kind, source="here", detail=detail, left_s=left_s)
