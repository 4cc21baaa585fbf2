"""What may go, as plain values."""

import math
from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.runs import claimed, committed, ended, ref

from storage.records import (
    CheckpointRef,
    Committed,
    Pinned,
    Record,
)
from storage.retention import plan_prune, plan_salvaged, resumed_from
from storage.run_state import RunState, apply


def steps(refs: list[CheckpointRef]) -> list[int]:
    return [r.step for r in refs]


def losses(**by_step: float) -> list[Committed]:
    return [committed(int(name[1:]), metrics={"loss": loss}) for name, loss in by_step.items()]


def unmeasured(checkpoint: Committed, value: float) -> Committed:
    """A record as a store could hold it that some other writer made."""
    return checkpoint.model_copy(update={"metrics": {"loss": value}})


def test_all_but_the_newest_may_go_oldest_first() -> None:
    plan = plan_prune([committed(s) for s in (10, 20, 30, 40)], keep_last=2)
    assert plan == [ref(10), ref(20)]


def test_milestones_final_and_pinned_ones_stay() -> None:
    checkpoints = [committed(10), committed(20), committed(30, final=True), committed(40), committed(50)]
    plan = plan_prune(checkpoints, keep_last=1, keep_every=20, pinned=[ref(10)])
    assert plan == []
    assert steps(plan_prune(checkpoints, keep_last=1)) == [10, 20, 40]


@pytest.mark.parametrize(("goal", "gone"), [("minimize", [1, 3]), ("maximize", [2, 4])])
def test_the_best_by_the_metric_stay(goal: str, gone: list[int]) -> None:
    checkpoints = losses(s1=0.9, s2=0.1, s3=0.8, s4=0.2, s5=0.5)
    kept = plan_prune(checkpoints, keep_last=1, keep_best=2, metric="loss", goal=goal)
    assert steps(kept) == gone


def test_of_equally_good_ones_the_earlier_stays() -> None:
    checkpoints = losses(s1=0.5, s2=0.5, s3=0.9)
    assert steps(plan_prune(checkpoints, keep_last=1, keep_best=1, metric="loss")) == [2]


@pytest.mark.parametrize("nonsense", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("goal", ["minimize", "maximize"])
def test_a_missing_or_broken_metric_is_never_the_best(nonsense: float, goal: str) -> None:
    checkpoints = [
        unmeasured(committed(1), nonsense),
        committed(2),
        committed(3, metrics={"loss": 0.3}),
        committed(4),
    ]
    plan = plan_prune(checkpoints, keep_last=1, keep_best=1, metric="loss", goal=goal)
    assert steps(plan) == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"keep_last": 0}, "keep_last must be at least 1, got 0"),
        ({"keep_last": 1, "keep_best": 1}, "needs a metric"),
        ({"keep_last": 1, "keep_every": -1}, "must not be negative"),
        ({"keep_last": 1, "goal": "best"}, "'minimize' or 'maximize', got 'best'"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(arguments: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        plan_prune([committed(1)], **arguments)  # type: ignore[arg-type]


CHECKPOINTS = st.lists(st.integers(1, 60), unique=True).flatmap(
    lambda chosen: st.tuples(
        *(
            st.builds(
                lambda step, loss, final: committed(
                    step, metrics={} if loss is None else {"loss": loss}, final=final
                ),
                st.just(step),
                st.none() | st.floats(-1, 1),
                st.booleans(),
            )
            for step in chosen
        )
    )
)


@given(
    CHECKPOINTS,
    st.integers(1, 5),
    st.integers(0, 7),
    st.integers(0, 4),
    st.sampled_from(["minimize", "maximize"]),
    st.sets(st.integers(1, 60)),
)
def test_no_plan_ever_endangers_what_must_stay(
    checkpoints: tuple[Committed, ...],
    keep_last: int,
    keep_every: int,
    keep_best: int,
    goal: str,
    pins: set[int],
) -> None:
    pinned = [ref(step) for step in pins]
    plan = plan_prune(
        checkpoints,
        keep_last=keep_last,
        keep_every=keep_every,
        keep_best=keep_best,
        metric="loss",
        goal=goal,
        pinned=pinned,
    )

    refs = [c.ref for c in checkpoints]
    kept = [c for c in checkpoints if c.ref not in plan]
    assert set(plan) <= set(refs)
    assert len(plan) == len(set(plan))
    assert steps(plan) == sorted(steps(plan))
    assert not set(plan) & set(pinned)
    assert all(c in kept for c in checkpoints if c.final)
    assert len(kept) >= min(keep_last, len(checkpoints))
    assert set(sorted(c.step for c in checkpoints)[-keep_last:]) <= {c.step for c in kept}
    # Pruning what is left again finds nothing more.
    assert plan_prune(
        kept, keep_last=keep_last, keep_every=keep_every, keep_best=keep_best, metric="loss", goal=goal,
        pinned=pinned,
    ) == []  # fmt: skip


# salvages, and what is being read


def salvage(step: int, attempt: int = 1) -> Committed:
    return committed(step, attempt).model_copy(update={"resumable": False})


def after(*records: Record) -> RunState:
    return reduce(apply, records, RunState())


def test_of_salvages_only_the_newest_is_of_use_and_only_while_it_is_ahead() -> None:
    behind = (claimed(), committed(10), salvage(20), ended(), claimed(2), salvage(30, 2), ended(2))
    assert plan_salvaged(after(*behind)) == [ref(20)]
    assert plan_salvaged(after(*behind, claimed(3), committed(30, 3))) == [ref(20), ref(30, 2)]


def test_a_pinned_salvage_and_one_of_the_attempt_that_runs_stay() -> None:
    story = (claimed(), salvage(10), ended(), claimed(2), salvage(20, 2), committed(30, 2))
    assert plan_salvaged(after(*story)) == [ref(10)]
    assert plan_salvaged(after(*story, Pinned(checkpoint=ref(10), at=1.0))) == []
    assert plan_salvaged(after(*story, ended(2))) == [ref(10), ref(20, 2)]


def test_what_the_attempt_that_runs_resumed_from_is_known_until_it_ends() -> None:
    story = (claimed(), committed(10), committed(20), ended(), claimed(2), committed(30, 2))
    assert resumed_from(after(*story)) == [ref(20)]
    assert resumed_from(after(*story, ended(2))) == []
