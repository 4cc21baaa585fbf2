"""Which queued run gets which free slot."""

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.control.scheduler import Avoided, FreeSlot, Placement, QueuedRun, assign

OLD = Avoided(node="old", because="it stalled there")


def queued(index: int, **changes: object) -> QueuedRun:
    return QueuedRun(run_id=f"cat-{index}", index=index, **changes)  # type: ignore[arg-type]


def free(slot: str, up_since: float = 0.0) -> FreeSlot:
    return FreeSlot(slot=slot, node=slot.split("/")[0], up_since=up_since)


def test_runs_go_in_the_order_of_the_sweep_to_the_nodes_that_are_up_longest() -> None:
    slots = [free("young/0", 30.0), free("old/0", 10.0), free("middle/0", 20.0)]

    assert assign([queued(1), queued(0)], slots, now=100.0) == [
        Placement("cat-0", "old/0", "old"),
        Placement("cat-1", "middle/0", "middle"),
    ]


def test_a_run_with_committed_work_goes_before_one_without() -> None:
    runs = [queued(0), queued(1), queued(2, committed_step=5)]

    assert [p.run_id for p in assign(runs, [free("n1/0"), free("n1/1")], now=0.0)] == ["cat-2", "cat-0"]


def test_how_much_work_is_committed_does_not_matter() -> None:
    runs = [queued(1, committed_step=900), queued(0, committed_step=5)]

    assert [p.run_id for p in assign(runs, [free("n1/0")], now=0.0)] == ["cat-0"]


def test_a_run_that_waits_after_a_stall_is_not_placed_before_its_time() -> None:
    run = queued(0, not_before=50.0)

    assert assign([run], [free("n1/0")], now=49.9) == []
    assert assign([run], [free("n1/0")], now=50.0) == [Placement("cat-0", "n1/0", "n1")]


def test_a_run_avoids_the_node_on_which_it_stalled() -> None:
    run = queued(0, avoid=OLD)

    assert assign([run], [free("old/0", 1.0), free("young/0", 2.0)], now=0.0) == [
        Placement("cat-0", "young/0", "young")
    ]


def test_a_run_takes_the_node_on_which_it_stalled_if_there_is_no_other() -> None:
    slots = [free("old/0"), free("old/1")]

    assert assign([queued(0, avoid=OLD)], slots, now=0.0) == [Placement("cat-0", "old/0", "old")]


def test_a_placement_says_why_there() -> None:
    old, young = free("old/0", 1.0), free("young/0", 2.0)

    def because(run: QueuedRun, *slots: FreeSlot) -> str:
        return assign([run], slots, now=0.0)[0].because

    assert because(queued(0), old) == "the only free slot"
    assert because(queued(0), young, old) == "up longest of 2 free slots"
    assert because(queued(0, avoid=OLD), young, old) == (
        "up longest of the free slots that are not on old: it stalled there"
    )
    assert because(queued(0, avoid=OLD), old) == "no slot was free on another node, although it stalled there"
    assert because(queued(0, avoid=OLD), young) == "the only free slot"


def test_a_waiting_run_does_not_keep_a_slot_from_the_next() -> None:
    runs = [queued(0, not_before=9.0), queued(1)]

    assert assign(runs, [free("n1/0")], now=0.0) == [Placement("cat-1", "n1/0", "n1")]


RUNS = st.lists(
    st.builds(
        lambda committed, not_before, avoid: (
            committed,
            not_before,
            avoid and Avoided(node=avoid, because=""),
        ),
        st.sampled_from([0, 3]),
        st.sampled_from([0.0, 5.0, 20.0]),
        st.sampled_from([None, "n0", "n1"]),
    ),
    max_size=6,
)
SLOTS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), unique=True, max_size=6)


@given(RUNS, SLOTS)
def test_no_run_and_no_slot_is_placed_twice_and_none_is_left_idle(
    runs: list[tuple[int, float, Avoided | None]], slots: list[tuple[int, int]]
) -> None:
    due = [
        queued(n, committed_step=committed, not_before=not_before, avoid=avoid)
        for n, (committed, not_before, avoid) in enumerate(runs)
    ]
    there = [free(f"n{node}/{number}", up_since=node) for node, number in slots]

    placements = assign(due, there, now=10.0)

    assert len({p.run_id for p in placements}) == len({p.slot for p in placements}) == len(placements)
    assert {p.slot for p in placements} <= {s.slot for s in there}
    assert len(placements) == min(sum(r.not_before <= 10.0 for r in due), len(there))
    assert assign(due[::-1], there[::-1], now=10.0) == placements, (
        "the order of the arguments must not matter"
    )
