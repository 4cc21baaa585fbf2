"""What stands of all that was said of a node."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.notices import spot

from orchestrator.notices.notice import CALM_S, LONGEST_CALM_S, Kind, Notice, Standing, after, calm_s, told


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
