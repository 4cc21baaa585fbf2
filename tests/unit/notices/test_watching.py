"""The watcher: whom it asks and how often, and what it passes on."""

import logging
import threading
from pathlib import Path

import pytest
from support.fake_metadata import announce, metadata_service
from support.notices import NOWHERE, spot

from orchestrator.grid.schema import Notices
from orchestrator.notices.clouds import Aws
from orchestrator.notices.metadata import NobodyHere, Unreachable
from orchestrator.notices.notice import SOON_S, Notice
from orchestrator.notices.sources import Auto, source_of
from orchestrator.notices.watcher import LONGEST_POLL_S, PATIENCE, POLL_S, UNHEARD_S, NoticeWatcher


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
