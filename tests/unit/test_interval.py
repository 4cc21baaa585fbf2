"""``checkpoint.every: auto``: the value, its bounds and reasons, and how it gets to the training process."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.runs import RUN, claimed, committed, ended, lived
from support.training import events

from orchestrator.grid.schema import Checkpoint
from storage.memory import MemoryStore
from storage.records import EndReason, Record
from storage.run_state import RunState
from trainer.interval import MIN_S, PRIOR_LOSSES, Life, Lifetimes, choose, learned, lives
from trainer.pacing import Inflation, Pacer, PaceReader
from trainer.rundir import CheckpointPolicy, Options, RunDir

HOUR = 3600.0
seconds = st.floats(0.0, 1e7)
scales = st.floats(60.0, 1e7)
costs = st.floats(0.0, 60.0)


def state(*records: Record) -> RunState:
    return lived(MemoryStore(), RUN, *records).state


def at(record: Record, when: float, **changes: object) -> Record:
    return record.model_copy(update={"at": when, **changes})


@pytest.mark.parametrize(
    ("age_s", "cost_s", "upload_s", "every_s"),
    [
        # sqrt(2 * 2 s / h), with h = 0.6/6300 * (age/6300)^-0.4
        (600.0, 2.0, 5.0, 128.07),
        (24 * HOUR, 2.0, 5.0, 345.99),
        (600.0, 0.05, 5.0, 30.0),
        (600.0, 0.05, 66.0, 66.0),
        (240 * HOUR, 10.0, 5.0, 600.0),
        (0.0, 2.0, None, 80.80),
    ],
)
def test_the_interval_that_costs_least_within_its_bounds(
    age_s: float, cost_s: float, upload_s: float | None, every_s: float
) -> None:
    chosen = choose(Lifetimes(), age_s=age_s, cost_s=cost_s, upload_s=upload_s)
    assert chosen.every_s == pytest.approx(every_s, rel=1e-3)


def test_the_reason_is_one_line_that_says_which_bound_holds() -> None:
    slow = choose(Lifetimes(losses=3), age_s=600, cost_s=0.05, upload_s=66)
    assert slow.why == (
        "a node 10 min old is lost once in 68 min (3 losses seen), a checkpoint costs 50 ms: "
        "20 s would be best, its upload takes 66 s"
    )
    assert choose(Lifetimes(), age_s=600, cost_s=0.05, upload_s=5).why.endswith("never below 30 s")
    assert choose(Lifetimes(), age_s=1e6, cost_s=10, upload_s=5).why.endswith("at most 10 min")
    assert choose(Lifetimes(), age_s=1, cost_s=None, upload_s=None).why == "no checkpoint is measured yet"


@given(scale=scales, shorter=st.floats(0.01, 1.0), age_s=seconds, cost_s=costs, upload_s=seconds)
def test_shorter_lives_never_mean_a_longer_interval(
    scale: float, shorter: float, age_s: float, cost_s: float, upload_s: float
) -> None:
    def every(scale_s: float) -> float:
        lifetimes = Lifetimes(scale_s=scale_s)
        return choose(lifetimes, age_s=age_s, cost_s=cost_s, upload_s=upload_s).every_s

    assert every(scale * shorter) <= every(scale) * (1 + 1e-9)


@given(scale=scales, age_s=seconds, older_s=seconds, cost_s=costs, more_s=costs, upload_s=seconds)
def test_an_older_node_or_a_dearer_checkpoint_never_means_a_shorter_interval(
    scale: float, age_s: float, older_s: float, cost_s: float, more_s: float, upload_s: float
) -> None:
    lifetimes = Lifetimes(scale_s=scale)
    least = choose(lifetimes, age_s=age_s, cost_s=cost_s, upload_s=upload_s).every_s
    assert choose(lifetimes, age_s=age_s + older_s, cost_s=cost_s, upload_s=upload_s).every_s >= least * (
        1 - 1e-9
    )
    assert choose(lifetimes, age_s=age_s, cost_s=cost_s + more_s, upload_s=upload_s).every_s >= least * (
        1 - 1e-9
    )


@given(scale=scales, age_s=seconds, cost_s=costs, upload_s=seconds, max_s=st.floats(MIN_S, 1e5))
def test_no_interval_is_shorter_than_an_upload_or_longer_than_the_bound(
    scale: float, age_s: float, cost_s: float, upload_s: float, max_s: float
) -> None:
    every = choose(
        Lifetimes(scale_s=scale), age_s=age_s, cost_s=cost_s, upload_s=upload_s, max_s=max_s
    ).every_s
    assert max(MIN_S, upload_s) <= every <= max(MIN_S, upload_s, max_s)


def test_the_prior_is_learned_back_from_what_it_expects_and_from_nothing() -> None:
    prior = Lifetimes()
    assert learned([]) == pytest.approx(prior)
    mean = [Life(prior.scale_s, True)] * 50  # each adds scale^k to the exposure, as the prior expects
    assert learned(mean).scale_s == pytest.approx(prior.scale_s)
    assert learned(mean).losses == 50


def test_a_few_losses_do_not_swing_the_estimate_and_many_do() -> None:
    prior = Lifetimes()
    one = learned([Life(60.0, True)])
    many = learned([Life(60.0, True)] * 200)
    assert prior.scale_s * (PRIOR_LOSSES / (PRIOR_LOSSES + 1)) ** 2 < one.scale_s < prior.scale_s
    assert many.scale_s < 120


@given(st.lists(st.builds(Life, st.floats(0, 1e6), st.booleans()), max_size=20))
def test_a_node_that_lives_on_lengthens_the_estimate_and_a_loss_shortens_it_least(seen: list[Life]) -> None:
    assert learned([*seen, Life(1e4, False)]).scale_s > learned(seen).scale_s
    assert learned([*seen, Life(1e4, True)]).scale_s < learned([*seen, Life(1e4, False)]).scale_s


def test_lives_of_nodes_are_read_from_the_logs() -> None:
    lost = at(ended(1, EndReason.NODE_LOST), 1100.0, silent_s=100.0)
    first = state(at(claimed(1, node="n1"), 0.0), lost, at(claimed(2, node="n2"), 1200.0))
    # n1 had a second slot, which went with it; another n1 came later and lives on.
    second = state(
        at(claimed(1, node="n1"), 500.0),
        at(ended(1, EndReason.NODE_LOST), 1005.0),
        at(claimed(2, node="n1"), 2000.0),
    )
    drained = state(at(claimed(1, node="n3"), 100.0), at(ended(1, EndReason.DRAINED), 400.0))

    assert sorted(lives([first, second, drained], 3000.0), key=lambda life: (life.seconds, life.lost)) == [
        Life(300.0, False),
        Life(1000.0, False),
        Life(1000.0, True),
        Life(1800.0, False),
    ]


def test_a_crash_of_the_trainer_is_no_loss_of_a_node() -> None:
    crashed = state(at(claimed(1), 0.0), committed(1), at(ended(1, EndReason.APP_ERROR), 50.0))
    assert lives([crashed], 100.0) == [Life(50.0, False)]


class Clock:
    def __init__(self) -> None:
        self.now = 1e6

    def __call__(self) -> float:
        return self.now


AUTO = Options(checkpoint=CheckpointPolicy(every_s=MIN_S, auto_max_s=600.0), lifetimes=Lifetimes(scale_s=1e6))


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


def test_the_training_process_follows_what_the_supervisor_measures(run_dir: RunDir) -> None:
    clock = Clock()
    pacer, reader = Pacer(run_dir, AUTO, clock), PaceReader(run_dir, AUTO, clock)
    assert reader.every_s(1) == MIN_S
    pacer.review()
    clock.now += 2
    assert reader.every_s(2) == MIN_S

    pacer.uploaded(75.0)
    pacer.checkpointed({"stall_s": 0.001, "inflation_s": 0.0})
    pacer.review()
    assert reader.every_s(3) == MIN_S, "looks once a second at most"
    clock.now += 2
    assert reader.every_s(3) == 75.0
    assert [event["every_s"] for event in events(run_dir, "interval")] == [MIN_S, 75.0]
    assert "its upload takes 75 s" in events(run_dir, "interval")[-1]["why"]


def test_a_small_change_is_not_written(run_dir: RunDir) -> None:
    clock = Clock()
    pacer = Pacer(run_dir, AUTO, clock)
    pacer.uploaded(75.0)
    pacer.checkpointed({"stall_s": 0.0})
    pacer.review()
    before = run_dir.interval.read_bytes()
    pacer.uploaded(77.0)
    pacer.review()
    assert run_dir.interval.read_bytes() == before
    for _ in range(5):
        pacer.uploaded(150.0)
    pacer.review()
    assert json.loads(run_dir.interval.read_bytes())["every_s"] == 150.0


def test_the_first_measurement_is_told_also_if_the_interval_stays(run_dir: RunDir) -> None:
    clock = Clock()
    pacer = Pacer(run_dir, AUTO, clock)
    pacer.review()
    assert json.loads(run_dir.interval.read_bytes())["why"] == "no checkpoint is measured yet"
    pacer.checkpointed({"stall_s": 0.0})
    pacer.review()
    told = json.loads(run_dir.interval.read_bytes())
    assert told["every_s"] == MIN_S
    assert "a checkpoint costs 0 ms" in told["why"]


def test_without_auto_nothing_is_written_and_nothing_is_read(run_dir: RunDir) -> None:
    options = Options(checkpoint=CheckpointPolicy(every_s=7.0))
    pacer = Pacer(run_dir, options)
    pacer.checkpointed({"stall_s": 1.0})
    pacer.review()
    assert not run_dir.interval.exists()
    run_dir.interval.write_text('{"every_s": 1.0}')
    assert PaceReader(run_dir, options).every_s(1) == 7.0


@pytest.mark.parametrize("body", ["", "{", '{"every_s": 0}', '{"every_s": "x"}', "[]"])
def test_a_file_that_is_no_interval_changes_nothing(body: str, run_dir: RunDir) -> None:
    run_dir.interval.write_text(body)
    assert PaceReader(run_dir, AUTO).every_s(1) == MIN_S


def test_steps_that_are_slower_while_a_checkpoint_is_written_count_as_its_cost() -> None:
    inflation = Inflation()
    inflation.step(1.0, writing=False)
    inflation.step(1.5, writing=True)
    inflation.step(0.9, writing=True)
    assert inflation.taken() == pytest.approx(0.5)
    assert inflation.taken() == 0.0


def test_the_words_of_the_file() -> None:
    assert Checkpoint(every="auto").policy == CheckpointPolicy(every_s=MIN_S, auto_max_s=600.0)
    assert Checkpoint(every="auto", max_every="5m").policy.auto_max_s == 300.0
    assert Checkpoint(every="90s").policy == CheckpointPolicy(every_s=90.0)
    assert Checkpoint(every=200).policy == CheckpointPolicy(every_steps=200, every_s=None)
    with pytest.raises(ValueError, match="or 'auto', got 'automatic'"):
        Checkpoint(every="automatic")
    with pytest.raises(ValueError, match="must be a time"):
        Checkpoint(max_every="soon")
