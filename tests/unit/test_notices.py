"""What a node is told of its end: read from services that play each provider, folded, and passed on."""

import contextlib
import logging
import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fake_metadata import INSTANCE, VM, FakeMetadata, announce, metadata_service, withdraw

from orchestrator.errors import InvalidFile
from orchestrator.grid.schema import Notices, Resources
from orchestrator.grid.sweep import validate
from orchestrator.notices.clouds import Aws, Azure, Gcp
from orchestrator.notices.metadata import NobodyHere, Unreachable, ask
from orchestrator.notices.notice import (
    CALM_S,
    LONGEST_CALM_S,
    SOON_S,
    Kind,
    Notice,
    Standing,
    after,
    calm_s,
    told,
)
from orchestrator.notices.own import Command, File, Url, said
from orchestrator.notices.sources import AZURE_TAG, Auto, source_of, vendor
from orchestrator.notices.watcher import LONGEST_POLL_S, PATIENCE, POLL_S, UNHEARD_S, NoticeWatcher

NOWHERE = "http://127.0.0.1:9"
"""The discard port, at which nothing listens."""

CLOUDS = {"aws": Aws, "gcp": Gcp, "azure": Azure}


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "notice.json"


@pytest.fixture(params=["aws", "gcp", "azure"])
def cloud(request: pytest.FixtureRequest, state: Path) -> Iterator[FakeMetadata]:
    with metadata_service(request.param, state) as service:
        yield service


def spot(left_s: float | None = 120.0, kind: Kind = Kind.TERMINATE) -> Notice:
    return Notice(kind=kind, source="AWS", left_s=left_s)


# The sweep file.

GRID = "parameters: {rank: {values: [4]}}\nbase: {model: owner/model}\ndataset: {path: photos}\n"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("none", Notices(service="none")),
        ("aws", Notices(service="aws")),
        ("{file: /run/ending}", Notices(file="/run/ending")),
        ("{command: [check, --now]}", Notices(command=("check", "--now"))),
        ("{url: http://10.0.0.1/ending}", Notices(url="http://10.0.0.1/ending")),
    ],
)
def test_a_sweep_file_names_who_tells(written: str, expected: Notices, tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text(f"{GRID}resources: {{notices: {written}}}\n")
    resources = validate(file).grid.resources
    assert resources.notices == expected
    assert Resources.model_validate_json(resources.model_dump_json()) == resources
    assert source_of(Notices()) is not None


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        (
            "awss",
            "4:22 E2111 resources.notices.service must be 'auto', 'none', 'aws', 'gcp' or 'azure', got 'awss'"
            " — did you mean 'aws'?",
        ),
        (
            "{file: run/ending}",
            "4:29 E2111 resources.notices.file must be an absolute path on the node, got 'run/ending'",
        ),
        (
            "{url: ftp://x}",
            "4:28 E2111 resources.notices.url must begin with http:// or https://, got 'ftp://x'",
        ),
        (
            "{url: 'https://somebody@10.0.0.1/x'}",
            "4:28 E2111 resources.notices.url must not contain a user or a password:"
            " the file is kept, and shown, as it is",
        ),
        ("{fil: /x}", "4:23 E2103 unknown key 'fil' in resources.notices — did you mean 'file'?"),
        (
            "{file: /x, command: [y]}",
            "4:22 E2111 resources.notices must name one of service, file, command and url",
        ),
        ("{command: check}", "4:32 E2110 'command: check' must be a list — write command: [check]"),
    ],
)
def test_a_mistake_is_told_where_it_is(written: str, complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text(f"{GRID}resources: {{notices: {written}}}\n")
    with pytest.raises(InvalidFile) as error:
        validate(file)
    assert str(error.value).splitlines()[0] == f"{file}:{complaint}"


# Providers.


@pytest.mark.parametrize("in_s", [120, 30, 5])
def test_each_cloud_tells_a_notice_and_its_end(cloud: FakeMetadata, state: Path, in_s: int) -> None:
    source = source_of(Notices(service=cloud.provider), cloud.url)  # type: ignore[arg-type]
    assert source is not None
    assert source.poll() is None
    announce(state, in_s)
    notice = source.poll()
    withdraw(state)
    after_it = source.poll()

    assert notice is not None
    assert notice.kind is Kind.TERMINATE
    assert notice.ends_node
    assert notice.left_s is not None
    if cloud.provider == "gcp":  # which tells no time
        assert notice.left_s == 30.0
    else:  # the service tells whole seconds, and its machine may be slow
        assert in_s - 60 < notice.left_s <= in_s + 1
    assert after_it is None


def test_the_time_left_is_by_the_clock_of_the_service(state: Path) -> None:
    with metadata_service("aws", state) as service:
        service.skew_s = 3 * 3600.0
        announce(state, 120)
        notice = Aws(service.url).poll()
    assert notice is not None
    assert notice.left_s is not None
    assert 60 < notice.left_s <= 121


def test_aws_is_asked_with_a_token_that_is_renewed_when_it_is_over(state: Path) -> None:
    with metadata_service("aws", state) as service:
        source = Aws(service.url)
        announce(state, 30)
        first = source.poll()
        service.tokens.clear()
        second = source.poll()
    assert first is not None
    assert second is not None
    assert first.detail == f"{INSTANCE}: terminate"
    assert service.requests.count("PUT /latest/api/token") == 2


def test_aws_tells_of_a_rebalance_which_ends_nothing(state: Path) -> None:
    with metadata_service("aws", state) as service:
        announce(state, 0, "rebalance")
        notice = Aws(service.url).poll()
    assert notice == Notice(kind=Kind.REBALANCE, source="AWS", detail=INSTANCE)
    assert not notice.ends_node


@pytest.mark.parametrize(
    ("provider", "detail"), [("gcp", "TERMINATE_ON_HOST_MAINTENANCE"), ("azure", "vm-7: Redeploy")]
)
def test_maintenance_that_nothing_survives_is_a_notice(provider: str, detail: str, state: Path) -> None:
    with metadata_service(provider, state) as service:
        announce(state, 600, "maintenance")
        notice = CLOUDS[provider](service.url).poll()
    assert notice is not None
    assert (notice.kind, notice.detail) == (Kind.MAINTENANCE, detail)


@pytest.mark.parametrize(("gpus", "left_s"), [(True, 3600.0), (False, 60.0)])
def test_google_tells_machines_with_gpus_an_hour_ahead(
    gpus: bool, left_s: float, state: Path, tmp_path: Path
) -> None:
    gpu = tmp_path / "nvidiactl"
    if gpus:
        gpu.touch()
    with metadata_service("gcp", state) as service:
        announce(state, 600, "maintenance")
        notice = Gcp(service.url, gpu=gpu).poll()
    assert notice is not None
    assert notice.left_s == left_s


@pytest.mark.parametrize(
    ("provider", "kind", "beside"),
    [("aws", "rebalance", "rebalance"), ("gcp", "maintenance", "maintenance-event")],
)
def test_what_cannot_be_asked_beside_a_termination_is_as_it_was_and_hides_none(
    provider: str, kind: str, beside: str, state: Path
) -> None:
    with metadata_service(provider, state) as service:
        source = CLOUDS[provider](service.url)
        service.broken_paths = (beside,)
        assert source.poll() is None
        service.broken_paths = ()
        announce(state, 60, kind)
        lesser = source.poll()
        service.broken_paths = (beside,)
        withdraw(state)
        assert source.poll() == lesser
        announce(state, 60)
        notice = source.poll()
    assert lesser is not None
    assert lesser.kind == kind
    assert notice is not None
    assert notice.kind is Kind.TERMINATE


def test_a_termination_counts_although_the_instance_has_no_name(state: Path) -> None:
    with metadata_service("aws", state) as service:
        service.silent_paths = ("instance-id",)
        announce(state, 60)
        notice = Aws(service.url).poll()
    assert notice is not None
    assert (notice.kind, notice.detail) == (Kind.TERMINATE, "this instance: terminate")


def test_azure_tells_every_machine_of_a_set_about_all_of_them(state: Path) -> None:
    with metadata_service("azure", state) as service:
        announce(state, 60, "somebody else's, and a freeze of ours")
        assert Azure(service.url).poll() is None
        announce(state, 60)
        notice = Azure(service.url).poll()
    assert notice is not None
    assert notice.detail == f"{VM}: Preempt"


def test_a_service_that_is_away_or_broken_says_nothing(cloud: FakeMetadata, state: Path) -> None:
    announce(state, 30)
    cloud.broken = True
    with pytest.raises(Unreachable):
        CLOUDS[cloud.provider](cloud.url).poll()
    with pytest.raises(Unreachable):
        CLOUDS[cloud.provider](NOWHERE).poll()


def test_a_proxy_is_never_asked(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, NOWHERE)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with metadata_service("aws", state) as service:
        assert Aws(service.url).poll() is None


def test_an_answer_in_drops_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.notices.metadata.LONGEST_S", 0.1)

    def drip(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
            for _ in range(100):
                connection.sendall(b"x")
                time.sleep(0.02)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=drip, args=(listening,))
        thread.start()
        try:
            with pytest.raises(Unreachable, match="not whole within"):
                ask(f"http://127.0.0.1:{listening.getsockname()[1]}/")
        finally:
            thread.join()


def test_a_redirect_is_an_answer_and_not_followed() -> None:
    asked: list[bytes] = []

    def redirect(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection:
            asked.append(connection.recv(1000))
            connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=redirect, args=(listening,))
        thread.start()
        try:
            answer = ask(f"http://127.0.0.1:{listening.getsockname()[1]}/here")
        finally:
            thread.join()
    assert (answer.status, len(asked)) == (302, 1)


def test_the_cloud_that_answers_is_found(cloud: FakeMetadata, state: Path, tmp_path: Path) -> None:
    source = Auto(cloud.url, dmi=tmp_path / "no-dmi")
    announce(state, 30)
    notice = source.poll()
    assert notice is not None
    assert notice.source == CLOUDS[cloud.provider].name


@pytest.mark.parametrize(
    ("files", "cloud"),
    [
        ({"sys_vendor": "Amazon EC2\n"}, "AWS"),
        ({"sys_vendor": "Xen\n", "bios_version": "4.11.amazon\n"}, "AWS"),
        ({"sys_vendor": "Google\n", "product_name": "Google Compute Engine\n"}, "Google Cloud"),
        ({"sys_vendor": "Microsoft Corporation\n", "chassis_asset_tag": AZURE_TAG}, "Azure"),
        ({"sys_vendor": "Microsoft Corporation\n"}, None),
        ({"sys_vendor": "Dell Inc.\n"}, None),
        ({}, None),
    ],
)
def test_a_machine_knows_whose_it_is(files: dict[str, str], cloud: str | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert vendor(tmp_path) == cloud


def test_where_no_cloud_answers_nothing_is_known(tmp_path: Path) -> None:
    with pytest.raises(Unreachable):
        Auto(NOWHERE, dmi=tmp_path).poll()


# One's own.


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


# What stands.


def test_a_notice_counts_at_first_sight_and_keeps_what_was_said_first() -> None:
    first = after(Standing(), spot(118.0), now=1000.0)
    later = after(first, spot(100.0), now=1018.5)

    assert told(first, 1000.0) == Notice(kind=Kind.TERMINATE, source="AWS", left_s=118.0, warning_s=118.0)
    assert told(later, 1020.0) == Notice(kind=Kind.TERMINATE, source="AWS", left_s=98.0, warning_s=118.0)
    assert str(told(later, 1020.0)) == "spot notice from AWS, 118 s warning"


def test_a_withdrawn_notice_counts_until_it_has_been_calm() -> None:
    standing = after(after(Standing(), spot(), now=0.0), None, now=10.0)
    assert (notice := told(standing, 10.0)) is not None
    assert notice.withdrawn
    assert notice.ends_node
    assert not notice.overdue

    assert told(after(standing, None, now=10.0 + CALM_S - 1), 39.0) is not None
    assert told(after(standing, None, now=10.0 + CALM_S), 40.0) is None


def test_a_notice_that_comes_and_goes_is_one_notice_and_needs_more_calm_each_time() -> None:
    standing, now = Standing(), 0.0
    for _ in range(3):
        standing = after(standing, spot(), now)
        standing = after(standing, None, now + 10.0)
        now += 20.0
        assert told(standing, now) is not None
    assert standing.withdrawals == 3
    assert [calm_s(n) for n in (1, 2, 3)] == [CALM_S, 2 * CALM_S, 4 * CALM_S]
    assert calm_s(1000) == LONGEST_CALM_S


def test_a_rebalance_grows_into_a_notice_and_does_not_hide_its_withdrawal() -> None:
    rebalance = spot(None, Kind.REBALANCE)
    standing = after(after(Standing(), rebalance, 0.0), spot(120.0), 5.0)
    assert (notice := told(standing, 5.0)) is not None
    assert (notice.kind, notice.warning_s) == (Kind.TERMINATE, 120.0)

    withdrawn = after(standing, rebalance, 10.0)
    assert (notice := told(withdrawn, 10.0)) is not None
    assert (notice.kind, notice.withdrawn) == (Kind.TERMINATE, True)
    assert (notice := told(after(withdrawn, rebalance, 10.0 + CALM_S), 40.0)) is not None
    assert (notice.kind, notice.withdrawn) == (Kind.REBALANCE, False)


@pytest.mark.parametrize(
    ("left_s", "grace_s"), [(120.0, 118.0), (30.0, 28.0), (5.0, 3.0), (0.0, 2.0), (-9.0, 2.0), (None, 28.0)]
)
def test_the_grace_ends_before_the_node_does(left_s: float | None, grace_s: float) -> None:
    assert spot(left_s).grace_s == grace_s


@given(st.lists(st.sampled_from(["told", "rebalance", "nothing"]), max_size=40), st.floats(0.5, 60.0))
def test_no_history_uses_a_node_that_was_told_of_its_end_a_moment_ago(
    polls: list[str], every_s: float
) -> None:
    answers = {"told": spot(), "rebalance": spot(None, Kind.REBALANCE), "nothing": None}
    standing, now, last_told = Standing(), 0.0, None
    for poll in polls:
        now += every_s
        standing = after(standing, answers[poll], now)
        last_told = now if poll == "told" else last_told
        notice = told(standing, now)
        ends = notice is not None and notice.ends_node
        if last_told is not None and now - last_told < CALM_S:
            assert ends
        if last_told is None:
            assert not ends
        if poll == "told":
            assert notice is not None
            assert not notice.withdrawn


# The watcher.


class Played:
    """A source that gives what it is told to."""

    def __init__(self) -> None:
        self.answer: Notice | Exception | None = None

    def poll(self) -> Notice | None:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def source() -> Played:
    return Played()


def test_the_watcher_passes_on_changes_only(source: Played) -> None:
    heard: list[str] = []
    now = [0.0]

    def hear(notice: Notice | None) -> None:
        heard.append("over" if notice is None else "withdrawn" if notice.withdrawn else str(notice))

    watcher = NoticeWatcher(source, hear, clock=lambda: now[0])
    notice = spot(120.0)
    for at, answer in [
        (0, None),
        (2, notice),
        (4, spot(118.0)),
        (6, Unreachable("away")),
        (8, None),
        (10, None),
        (12, spot(110.0)),
        (14, None),
        (100, None),
        (102, None),
    ]:
        now[0], source.answer = float(at), answer
        watcher.look()
    told_once = "spot notice from AWS, 120 s warning"
    assert heard == [told_once, "withdrawn", told_once, "withdrawn", "over"]


def test_who_is_here_is_asked_as_often_when_he_does_not_answer_and_that_is_said_once(
    source: Played, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    now = [0.0]
    heard: list[str] = []
    watcher = NoticeWatcher(source, lambda notice: heard.append(watcher.unheard), clock=lambda: now[0])
    source.answer = spot(120.0)
    assert watcher.look() == POLL_S
    source.answer = Unreachable("http://user:s3cret@host: nobody answers")
    waits = []
    for now[0] in (10.0, 100.0, 9.0 + UNHEARD_S):
        waits.append(watcher.look())
    assert watcher.unheard == ""
    for now[0] in (11.0 + UNHEARD_S, 1000.0):
        waits.append(watcher.look())
    source.answer = ValueError("an answer that nobody thought of")
    waits.append(watcher.look())
    assert waits == [POLL_S] * 6
    assert watcher.notice is not None
    assert not watcher.notice.withdrawn, "silence has withdrawn it"
    said_so = "http://[redacted]@host: nobody answers"
    assert watcher.unheard == said_so
    source.answer = None
    watcher.look()
    assert watcher.unheard == ""
    assert heard == ["", said_so, ""]
    assert [r.message for r in caplog.records][1:-1] == [
        f"notices of this node's end cannot be heard: {said_so}",
        "notices can be heard again",
    ]


def test_where_nobody_was_ever_found_the_search_becomes_less_frequent(source: Played) -> None:
    watcher = NoticeWatcher(source, lambda notice: None)
    source.answer = NobodyHere("no cloud")
    waits = [watcher.look() for _ in range(PATIENCE + 8)]
    assert waits[: PATIENCE - 1] == [POLL_S] * (PATIENCE - 1)
    assert waits[-1] == LONGEST_POLL_S
    assert watcher.unheard == ""
    source.answer = Unreachable("it was found, and does not answer")
    assert watcher.look() == POLL_S


def test_a_machine_that_knows_its_cloud_is_never_alone(tmp_path: Path) -> None:
    for file, alone in ((None, True), ("Google", False)):
        if file:
            (tmp_path / "sys_vendor").write_text(file)
        with pytest.raises(Unreachable) as error:
            Auto(NOWHERE, dmi=tmp_path).poll()
        assert isinstance(error.value, NobodyHere) is alone


def test_an_end_that_is_brought_forward_is_passed_on(source: Played) -> None:
    now = [0.0]
    graces: list[float] = []

    def hear(notice: Notice | None) -> None:
        assert notice is not None
        graces.append(notice.grace_s)

    watcher = NoticeWatcher(source, hear, clock=lambda: now[0])
    for at, left_s in [(0, 300.0), (2, 298.0), (4, 295.0), (6, 20.0), (8, 17.0), (10, 12.0)]:
        now[0], source.answer = float(at), spot(left_s)
        watcher.look()
    assert graces == [298.0, 18.0, 10.0]


def test_a_notice_for_later_is_passed_on_again_when_it_is_for_soon(source: Played) -> None:
    now = [0.0]
    heard: list[tuple[float, bool]] = []

    def hear(notice: Notice | None) -> None:
        heard.append((now[0], notice is not None and notice.soon))

    watcher = NoticeWatcher(source, hear, clock=lambda: now[0])
    source.answer = spot(3600.0)
    watcher.look()
    source.answer = Unreachable("away")
    for now[0] in (2.0, 3599.0 - SOON_S, 3601.0 - SOON_S, 3603.0 - SOON_S):
        watcher.look()
    told_times = [(at, soon) for at, soon in heard if soon or at == 0.0]
    assert told_times[:2] == [(0.0, False), (3601.0 - SOON_S, True)]


def test_a_notice_is_heard_from_a_service_that_begins_to_tell_it(state: Path) -> None:
    heard = threading.Event()
    with metadata_service("aws", state) as service:
        watcher = NoticeWatcher(Aws(service.url), lambda notice: heard.set())
        watcher.look()
        assert not heard.is_set()
        announce(state, 5)
        watcher.look()
        assert heard.is_set()
        assert watcher.notice is not None
        assert watcher.notice.warning_s is not None


def test_without_a_source_nothing_is_watched() -> None:
    watcher = NoticeWatcher(source_of(Notices(service="none")), lambda notice: None)
    watcher.start()
    assert watcher.notice is None
