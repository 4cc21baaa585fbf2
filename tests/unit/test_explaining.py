"""``orchestrate explain``: why a run waits, why it is where it is, what its last end means for it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.fake_cluster import FakeCluster, small_sweep
from support.runs import state_after

from orchestrator.cli import main
from orchestrator.control.controller import Controller, policy_of
from orchestrator.control.lifecycle import Policy
from orchestrator.control.placing import Hold, Outlook, SlotNote, Standing, outlook, unused
from orchestrator.control.scheduler import QueuedRun
from orchestrator.grid.schema import Recovery, Resources
from orchestrator.reports.explaining import explain, summary
from storage import layout
from storage.directory import DirectoryStore
from storage.log import run_log
from storage.memory import MemoryStore
from storage.records import Claimed, Ended, EndReason, Finished, Outcome, Record, Started
from storage.run_state import RunState

R0, R1, R2 = (f"cat-{n}-{n:08x}" for n in range(3))
RESUME = "orchestrate resume cat"


class World:
    """A sweep on a cluster in virtual time."""

    def __init__(self, *, runs: int, nodes: int, max_concurrent: int | None = None) -> None:
        self.store = MemoryStore()
        sweep = small_sweep(runs=runs, max_steps=100, recovery=Recovery(backoff_s=60.0, silence_s=30.0))
        self.sweep = sweep.model_copy(update={"resources": Resources(max_concurrent=max_concurrent)})
        self.cluster = FakeCluster(self.store, self.sweep, nodes=nodes)
        self.controller = Controller(self.sweep, self.store, self.cluster, clock=self.cluster.clock)

    def ticks(self, number: int) -> None:
        for _ in range(number):
            self.controller.tick()
            self.cluster.advance()

    def told(self, run_id: str) -> tuple[str, ...]:
        explanation = explain(
            self.controller.states[run_id],
            policy_of(self.sweep.recovery),
            self.controller.outlook(run_id),
            self.cluster.now,
            resume=RESUME,
            at=lambda seconds: f"{seconds:g}",
        )
        return explanation.lines


def test_a_run_that_waits_for_a_slot_says_what_keeps_each_from_it() -> None:
    world = World(runs=4, nodes=3)
    world.ticks(7)
    assert world.told(R0)[0] == "Attempt 1 trains on n1."
    assert world.told(R0)[1] == "Attempt 1 went to n1 at 1000: up longest of 3 free slots."
    world.controller.drain("n2", 60.0)
    world.ticks(4)
    world.cluster.silence("n3/0")
    world.ticks(2)

    assert world.told(R1)[0] == (
        "It waits: no slot is free; of 3 slots, 1 trains another run, 1 is drained (n2), 1 is silent (n3)."
    )
    assert world.told(R1)[-1].startswith("Attempt 1 ended with DRAINED (")
    assert world.told(R1)[-1].endswith("no fault of the run, which costs it nothing.")
    assert "on n3, which has been silent for 1 s" in world.told(R2)[0]


def test_a_run_that_stalled_says_for_how_long_it_waits_and_which_node_it_avoids_then() -> None:
    world = World(runs=1, nodes=2)
    world.ticks(1)
    world.cluster.exit("n1/0", 1, "ValueError: no")
    world.ticks(2)

    now, there, again = world.told(R0)
    assert now == ("It waits: for another 58 s, because an attempt failed without a new checkpoint.")
    assert there == "Attempt 1 went to n1 at 1000: up longest of 2 free slots."
    assert again == (
        "Attempt 1 ended with APP_ERROR (the trainer on n1 exited with code 1: ValueError: no): "
        "a stall, the first; at 3 the run is given up."
    )

    world.ticks(60)
    assert world.told(R0)[1].endswith("not on n1: its last attempt stalled there.")
    world.ticks(4)
    assert world.told(R0)[2].endswith("a checkpoint was committed since, so nothing counts any more.")


def test_a_run_behind_others_says_how_many() -> None:
    world = World(runs=5, nodes=0)
    world.ticks(1)
    assert world.told(R2)[0] == (
        "It waits: no slot is free; the cluster has none: no node with room for a run has joined."
    )
    # As another controller would see it that has the slots but has not placed anything yet.
    outlook = Outlook(hold=Hold.OUTRANKED, ahead=2, free=2, slots=(slot("n1"), slot("n2")))
    told = explain(RunState(), Policy(), outlook, 0.0, resume=RESUME).now
    assert "2 runs are placed before it, on 2 free slots" in told


def test_a_run_that_the_sweeps_own_limit_keeps_back_says_so() -> None:
    world = World(runs=2, nodes=2, max_concurrent=1)
    world.ticks(3)

    assert world.told(R1)[0] == "It waits: as many runs train as resources.max_concurrent allows."


def test_a_run_behind_others_counts_no_slots_that_the_limit_leaves_unused() -> None:
    notes = tuple(slot(f"n{n}") for n in range(10))
    queued = [QueuedRun(run_id=f"r{n}", index=n) for n in range(6)]

    said = outlook(queued[4], queued, notes, drains_known=True, room=3, now=0.0)

    told = explain(RunState(), Policy(), said, 0.0, resume=RESUME).now
    assert "4 runs are placed before it, on 3 free slots" in told


def test_nothing_counts_against_the_limit_that_trains_nothing_and_gets_nothing() -> None:
    notes = [
        slot("a", Standing.DRAINED),
        slot("b", Standing.BARRED),
        slot("c", Standing.SILENT),
        slot("d"),
        replace(slot("e", Standing.DRAINED), run_id=R0),
    ]

    assert unused(notes) == {"a/0", "b/0"}


def test_a_damaged_log_is_the_reason() -> None:
    world = World(runs=1, nodes=1)
    world.ticks(2)
    world.store.put(layout.log_entry(layout.run_log_prefix(R0), 40), b"{}")
    for _ in range(20):
        world.ticks(1)
        if world.controller.damaged:
            break
        world.cluster.now += 5.0

    assert world.told(R0)[0].startswith("Its log is damaged, and nobody can go on with it: ")


def slot(node: str, standing: Standing = Standing.FREE, detail: str = "") -> SlotNote:
    return SlotNote(slot=f"{node}/0", node=node, up_since=0.0, standing=standing, detail=detail)


def test_slots_are_summed_up_by_what_keeps_them() -> None:
    busy = [slot(f"n{n}", Standing.BUSY) for n in range(998)]

    assert summary([*busy, slot("x", Standing.BARRED, "disk full"), slot("y", Standing.GONE)]) == (
        "of 999 slots, 998 trains another run, 1 is not used (x: disk full)"
    )
    assert summary([slot("y", Standing.GONE)]) == "all 1 that there were are gone with their nodes"


CLAIMED = Claimed(attempt=1, incarnation="0" * 8, node="n1", slot="n1/0", at=10.0)


@pytest.mark.parametrize(
    ("records", "now"),
    [
        ((), f"It waits, and no controller was reached: start one with {RESUME}."),
        ((CLAIMED,), "Attempt 1 is starting on n1."),
        ((CLAIMED, Started(attempt=1, step=0, at=11.0)), "Attempt 1 trains on n1."),
        (
            (CLAIMED, Ended(attempt=1, reason=EndReason.APP_ERROR, detail="x", at=20.0)),
            "It waits, and no controller was reached: it may be placed in 3 s, because an attempt failed "
            f"without a new checkpoint; start one with {RESUME}.",
        ),
        (
            (Finished(outcome=Outcome.FAILED, detail="no", step=3, at=1.0),),
            "It is over: FAILED at step 3: no.",
        ),
    ],
)
def test_without_a_controller_the_log_alone_explains_what_it_can(
    records: tuple[Record, ...], now: str
) -> None:
    assert explain(state_after(*records), Policy(), None, 22.0, resume=RESUME).now == now


def test_a_clock_that_is_wrong_makes_no_wait_longer_than_it_is() -> None:
    state = state_after(CLAIMED, Ended(attempt=1, reason=EndReason.APP_ERROR, at=9e9))

    assert "in 5 s" in explain(state, Policy(), None, 22.0, resume=RESUME).now


def test_what_is_told_is_safe_to_print() -> None:
    detail = "the trainer said \x1b]0;title\x07 hf_abcdefghijklmnopqrstuvwx\nmore"
    state = state_after(CLAIMED, Ended(attempt=1, reason=EndReason.APP_ERROR, detail=detail, at=20.0))

    told = "\n".join(explain(state, Policy(), None, 22.0, resume=RESUME).lines)

    assert "\x1b" not in told
    assert "hf_abc" not in told
    assert len(told.splitlines()) == 3


def test_the_command_explains_from_the_store_when_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATE_HOME", str(tmp_path / "home"))
    store, sweep = DirectoryStore(tmp_path / "store"), small_sweep()
    store.create(layout.sweep_spec(sweep.name), sweep.to_json())
    run_log(store, R0).append(CLAIMED)

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(main, ["explain", *arguments, "--store", store.url])
        assert result.exit_code == 0, result.output
        return result.output

    assert run("cat/0").startswith(f"{R0}: Attempt 1 is starting on n1.\nAttempt 1 went to n1 at ")
    waiting = json.loads(run("cat/1", "-o", "json"))
    assert (waiting["run"], waiting["status"], waiting["live"]) == (R1, "PENDING", False)
    assert f"orchestrate resume cat --store {store.url}" in waiting["now"]
