"""Nodes that fail their runs, judged by pure rules."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.runs import claimed, committed

from orchestrator.control import reputation
from orchestrator.control.reputation import (
    HALF_LIFE_S,
    JUDGE_EVERY_S,
    LONGEST_PAUSE_S,
    PAUSE_S,
    NodeBook,
    Repute,
    Stall,
    barred,
    judged,
    pause_s,
)
from storage.records import Ended, EndReason, Record
from storage.run_state import RunState, apply

NODES = ("n1", "n2")


def stall(
    run_id: str, at: float, node: str = "n1", *, claimed_at: float | None = None, weight: float = 1.0
) -> Stall:
    return Stall(
        node=node,
        run_id=run_id,
        reason=EndReason.CUDA_ERROR,
        claimed_at=at - 1 if claimed_at is None else claimed_at,
        at=at,
        weight=weight,
    )


def ill(
    *stalls: Stall,
    now: float = 100.0,
    progress: dict[str, set[str]] | None = None,
    good: dict[str, float] | None = None,
    nodes: tuple[str, ...] = NODES,
    pardons: dict[str, float] | None = None,
) -> dict[str, Repute]:
    return judged(stalls, progress or {}, good or {}, nodes, now, pardons)


def test_two_runs_that_fail_on_one_node_put_it_into_quarantine() -> None:
    assert ill(stall("a", 10)) == {}
    assert ill(stall("a", 10), stall("a", 20)) == {}, "one run, however often"

    found = ill(stall("a", 10), stall("b", 20))

    assert found["n1"] == Repute(
        node="n1",
        until=20 + PAUSE_S,
        strikes=1,
        because="2 runs failed there (CUDA_ERROR)",
    )


def test_what_was_long_ago_counts_less_and_ill_repute_passes() -> None:
    assert ill(stall("a", 0), stall("b", 2 * HALF_LIFE_S), now=2 * HALF_LIFE_S) == {}
    assert ill(stall("a", 10), stall("b", 20), now=20 + PAUSE_S + HALF_LIFE_S - 1)
    assert ill(stall("a", 10), stall("b", 20), now=20 + PAUSE_S + HALF_LIFE_S + 1) == {}


def test_a_kill_may_be_anybodys_doing() -> None:
    kills = [stall(run, 10, weight=0.5) for run in "abc"]

    assert ill(*kills) == {}
    assert ill(*kills, stall("d", 11, weight=0.5))


def test_a_run_that_fails_everywhere_speaks_against_no_node_unless_it_did_well_elsewhere() -> None:
    elsewhere = stall("a", 30, "n2")

    assert ill(stall("a", 10), stall("b", 20), elsewhere) == {}
    assert ill(stall("a", 10), stall("b", 20), elsewhere, progress={"a": {"n3"}}).keys() == {"n1"}


def test_a_commit_clears_a_node_and_so_does_an_operator() -> None:
    stalls = (stall("a", 10), stall("b", 20))

    assert ill(*stalls, good={"n1": 25.0}) == {}
    assert ill(*stalls, good={"n1": 15.0}) == {}, "only one is left"
    assert ill(*stalls, pardons={"n1": 25.0}) == {}


def test_a_failed_probation_doubles_the_pause_and_what_began_before_does_not() -> None:
    stalls = (stall("a", 10), stall("b", 20))
    late = stall("c", 30, claimed_at=15)
    probation = stall("c", 20 + PAUSE_S + 60, claimed_at=20 + PAUSE_S + 1)

    assert ill(*stalls, late)["n1"].strikes == 1
    found = ill(*stalls, probation, now=1000)["n1"]
    assert (found.strikes, found.until) == (2, 20 + PAUSE_S + 60 + 2 * PAUSE_S)


def test_without_a_contrast_it_is_not_the_node() -> None:
    here, there = (stall("a", 10), stall("b", 20)), (stall("c", 10, "n2"), stall("d", 20, "n2"))

    assert ill(*here, *there) == {}, "every node fails its runs"
    assert ill(*here, nodes=("n1",)) == {}, "there is no other"
    assert ill(*here, nodes=("n1",), good={"n9": 1.0}).keys() == {"n1"}, "another did better once"
    assert ill(*here, *there, nodes=("n1", "n2", "n3")).keys() == {"n1", "n2"}


def test_on_probation_a_node_gets_one_run_at_a_time() -> None:
    found = {"n1": Repute(node="n1", until=50.0, strikes=1, because="x")}
    slots = [("n1/0", "n1"), ("n1/1", "n1"), ("n2/0", "n2")]

    assert barred(slots, (), {}, 10.0) == {}
    assert barred(slots, (), found, 10.0).keys() == {"n1/0", "n1/1"}
    assert barred(slots, (), found, 50.0).keys() == {"n1/1"}
    assert barred(slots, ("n1/1",), found, 50.0).keys() == {"n1/0"}


@given(
    st.lists(
        st.builds(
            stall,
            st.sampled_from("abcd"),
            st.floats(0, 50_000),
            st.sampled_from(["n1", "n2", "n3"]),
            weight=st.sampled_from([0.5, 1.0]),
        ),
        max_size=25,
    ),
    st.floats(0, 60_000),
)
def test_somewhere_a_run_can_always_go_sooner_or_later(stalls: list[Stall], now: float) -> None:
    """I8: a sweep is never stuck because its nodes are in ill repute."""
    nodes = ("n1", "n2", "n3")
    found = ill(*stalls, now=now, nodes=nodes)

    assert set(nodes) - found.keys(), "with several nodes one of them is trusted"
    for repute in found.values():
        assert repute.until <= max(s.at for s in stalls) + LONGEST_PAUSE_S
        slots = [(f"{repute.node}/{n}", repute.node) for n in range(2)]
        assert len(barred(slots, (), found, repute.until)) == 1
    assert ill(*stalls, now=200_000.0, nodes=nodes) == {}, "in the end everything is forgiven"


@given(st.integers(1, 100))
def test_pauses_double_up_to_a_limit(strikes: int) -> None:
    assert PAUSE_S <= pause_s(strikes) <= pause_s(strikes + 1) <= LONGEST_PAUSE_S


def noted(book: NodeBook, run_id: str, *records: Record, wall: float = 100.0, now: float = 0.0) -> None:
    state = RunState()
    for record in records:
        state = apply(state, record)
        book.note(run_id, state, wall, now)


def ended(attempt: int, reason: EndReason, at: float = 1.5) -> Ended:
    return Ended(attempt=attempt, reason=reason, exit_code=1, at=at)


@pytest.mark.parametrize(
    ("reason", "blamed"),
    [
        (EndReason.CUDA_ERROR, True),
        (EndReason.STALLED, True),
        (EndReason.APP_ERROR, True),
        (EndReason.NODE_LOST, False),
        (EndReason.SPOT_NOTICE, False),
        (EndReason.STORAGE_DOWN, False),
        (EndReason.HUB_DOWN, False),
        (EndReason.NAN_LOSS, False),
    ],
)
def test_only_what_a_node_may_have_done_is_held_against_it(reason: EndReason, blamed: bool) -> None:
    book = NodeBook()
    for run_id in "ab":
        noted(book, run_id, claimed(1, node="n1"), ended(1, reason))

    assert (book.judged(NODES, 0.0).keys() == {"n1"}) == blamed


def test_a_book_reads_each_end_once_and_a_commit_when_it_comes() -> None:
    book = NodeBook()
    for run_id in "ab":
        noted(book, run_id, claimed(1, node="n1"), ended(1, EndReason.STALLED))
        noted(book, run_id, claimed(1, node="n1"), ended(1, EndReason.STALLED))
    assert book.judged(NODES, 0.0)["n1"].because.startswith("2 runs")

    noted(book, "c", claimed(1, node="n1"), committed(10), now=1.0)

    assert book.judged(NODES, 2.0) == {}


def test_an_attempt_that_made_progress_is_not_held_against_the_node() -> None:
    book = NodeBook()
    for run_id in "ab":
        noted(book, run_id, claimed(1, node="n1"), committed(10), ended(1, EndReason.APP_ERROR))

    assert book.judged(NODES, 0.0) == {}


def test_a_book_judges_again_only_on_news_or_when_it_has_been_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = []

    def counted(*arguments: Any) -> dict[str, Repute]:
        times.append(1)
        return judged(*arguments)

    monkeypatch.setattr(reputation, "judged", counted)
    book = NodeBook()

    def judge(now: float, *nodes: str) -> int:
        times.clear()
        book.judged(nodes or NODES, now)
        return len(times)

    noted(book, "a", claimed(1, node="n1"), ended(1, EndReason.STALLED))
    assert (judge(1.0), judge(2.0)) == (1, 0)
    noted(book, "b", claimed(1, node="n1"), ended(1, EndReason.STALLED))
    assert (judge(3.0), judge(4.0)) == (1, 0)
    noted(book, "c", claimed(1, node="n2"), committed(10))
    assert (judge(5.0), judge(6.0)) == (1, 0)
    noted(book, "c", claimed(1, node="n2"), committed(10), committed(20), now=6.0)
    assert judge(7.0) == 0, "nobody has anything against n2"
    assert (judge(8.0, "n1", "n2", "n3"), judge(9.0)) == (1, 1)
    assert judge(9.0 + JUDGE_EVERY_S) == 1
    book.pardon("n1", 20.0)
    assert judge(10.0 + JUDGE_EVERY_S) == 1
    book.pardon("n1", 20.001)
    assert judge(11.0 + JUDGE_EVERY_S) == 0
