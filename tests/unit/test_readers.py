"""Work for the store is done beside the deciding thread: what hangs is left behind, what fails is told."""

import threading

import pytest

from orchestrator.control.readers import THREADS, Readers


def test_all_is_done_at_once() -> None:
    together = threading.Barrier(THREADS, timeout=30.0)  # breaks if they came one by one

    done = Readers().do({str(n): together.wait for n in range(THREADS)}, None)  # type: ignore[dict-item]

    assert done == {str(n) for n in range(THREADS)}


def test_what_hangs_is_left_behind_and_not_begun_again() -> None:
    readers, release, begun = Readers(), threading.Event(), []

    def hang() -> None:
        begun.append("slow")
        release.wait(30.0)

    assert readers.do({"slow": hang, "quick": lambda: None}, 0.05) == {"quick"}
    assert readers.busy("slow")
    assert readers.do({"slow": hang, "quick": lambda: None}, 0.05) == {"quick"}
    release.set()
    assert readers.do({"last": lambda: None}, None) == {"last"}
    while readers.busy("slow"):
        readers.collect()
    assert begun == ["slow"]
    assert readers.do({"slow": hang}, None) == {"slow"}


def test_nothing_to_do_is_done() -> None:
    assert Readers().do({}) == set()


class Gone(BaseException):
    """As a test's dying process."""


@pytest.mark.parametrize("error", [ValueError("bug"), Gone()])
def test_an_error_that_nobody_expected_reaches_the_deciding_thread(error: BaseException) -> None:
    readers = Readers()

    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        readers.do({"a": fail, "b": lambda: None}, None)
    assert not readers.busy("a")
    assert not readers.busy("b")
    readers.collect()


def test_an_error_of_what_was_begun_and_not_waited_for_is_told_later() -> None:
    readers, ended = Readers(), threading.Event()

    def fail() -> None:
        try:
            raise ValueError("bug")
        finally:
            ended.set()

    readers.begin("a", fail)
    assert ended.wait(30.0)
    with pytest.raises(ValueError, match="bug"):
        until_idle(readers)


def until_idle(readers: Readers) -> None:
    while readers.busy("a"):
        readers.do({"b": lambda: None}, None)
