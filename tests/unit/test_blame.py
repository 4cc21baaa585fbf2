"""When an end proves that the run itself is at fault."""

from dataclasses import replace
from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.runs import claimed, committed, state_after

from orchestrator.control.blame import REPEATABLE, advised, proof
from orchestrator.control.cluster import Health, Slot
from orchestrator.control.lifecycle import Exited, Lost, Policy, advance, phase
from orchestrator.control.loss import loss
from orchestrator.control.placing import avoided
from orchestrator.control.scheduler import Avoided
from storage.records import Ended, EndReason, Finished, Outcome
from storage.run_state import FREE_ENDS, RunState, apply
from trainer.evidence import ADVICE, Evidence

NOW = 100.0
POLICY = Policy(max_failures=9)
GPU = 16_000_000_000


def end(
    attempt: int, reason: EndReason, step: int = 13, detail: str = "boom", memory_bytes: int | None = None
) -> Ended:
    return Ended(
        attempt=attempt,
        reason=reason,
        step=step,
        detail=detail,
        exit_code=1,
        memory_bytes=memory_bytes,
        at=NOW,
    )


def exited(
    attempt: int, error: str, kind: str = "", *, step: int = 13, memory_bytes: int | None = None
) -> Exited:
    evidence = Evidence(error_type=kind, memory_bytes=memory_bytes)
    return Exited(at=NOW, attempt=attempt, code=1, error=error, evidence=evidence, step=step)


def oom(attempt: int, memory_bytes: int | None = GPU, step: int = 13) -> Exited:
    said = f"OutOfMemoryError: CUDA out of memory. Tried to allocate {attempt} MiB"
    return exited(attempt, said, "OutOfMemoryError", memory_bytes=memory_bytes, step=step)


def outcome(state: RunState, event: Exited, suspects: frozenset[str] = frozenset()) -> str | None:
    last = advance(state, event, POLICY, suspects)[-1]
    return last.detail if isinstance(last, Finished) and last.outcome is Outcome.FAILED else None


def test_out_of_gpu_memory_is_tried_once_more_and_then_says_what_to_do() -> None:
    first = state_after(claimed(1))
    assert outcome(first, oom(1)) is None
    records = advance(first, oom(1), POLICY)
    assert isinstance(records[0], Ended)
    assert (records[0].reason, records[0].memory_bytes) == (EndReason.OOM_GPU, GPU)

    second = apply(reduce(apply, records, first), claimed(2, node="n2"))
    said = outcome(second, oom(2))

    assert said is not None
    assert "; out of memory twice, with memory of 16.0 GB (step 0): to need less memory, in order" in said


def test_a_larger_gpu_is_tried() -> None:
    state = state_after(claimed(1), end(1, EndReason.OOM_GPU, memory_bytes=GPU), claimed(2, node="large"))

    assert outcome(state, oom(2, memory_bytes=5 * GPU, step=9)) is None
    assert outcome(state, oom(2, memory_bytes=GPU, step=9)) is not None
    assert outcome(state, oom(2, memory_bytes=None, step=9)) is not None, "for all we know it is as small"


def test_out_of_memory_after_progress_is_not_the_second_time() -> None:
    state = state_after(
        claimed(1), end(1, EndReason.OOM_GPU, memory_bytes=GPU), claimed(2), committed(500, 2)
    )

    assert outcome(state, oom(2, step=900)) is None


@pytest.mark.parametrize(("nodes", "failed"), [(("n1", "n1"), False), (("n1", "n2"), True)])
def test_an_agent_that_was_ended_for_memory_twice_on_one_node_may_have_a_greedy_neighbour(
    nodes: tuple[str, str], failed: bool
) -> None:
    state = RunState()
    for attempt, node in enumerate(nodes, 1):
        state = apply(state, claimed(attempt, node=node))
        lost = Lost(at=NOW, attempt=attempt, reason=EndReason.OOM_HOST, detail="no memory", step=50 * attempt)
        state = reduce(apply, advance(state, lost, POLICY), state)

    assert (state.finished is not None) == failed


def test_a_lost_node_between_does_not_hide_the_second_time() -> None:
    state = state_after(
        claimed(1), end(1, EndReason.OOM_HOST), claimed(2), end(2, EndReason.NODE_LOST), claimed(3)
    )
    event = exited(3, "MemoryError: ", "MemoryError", step=2)

    assert outcome(state, event) is not None


def test_the_same_error_at_the_same_step_on_two_nodes_is_the_runs_own_though_it_made_progress() -> None:
    detail = "the trainer exited with code 1: KeyError: 'seven'"
    before = (claimed(1, node="n1"), committed(10, 1), end(1, EndReason.APP_ERROR, 13, detail))
    state = state_after(*before, claimed(2, node="n2"), committed(12, 2))

    said = outcome(state, exited(2, "KeyError: 'seven'", "KeyError"))

    assert said == f"{detail}; the same at step 13 on n1 and n2 (step 12)"


@pytest.mark.parametrize(
    ("node", "error", "step"),
    [("n1", "a", 13), ("n2", "b", 13), ("n2", "a", 14)],
    ids=["node", "error", "step"],
)
def test_anything_else_is_no_proof(node: str, error: str, step: int) -> None:
    before = (
        claimed(1, node="n1"),
        committed(10, 1),
        end(1, EndReason.APP_ERROR, 13, "the trainer exited with code 1: a"),
    )

    assert outcome(state_after(*before, claimed(2, node=node)), exited(2, error, step=step)) is None


@pytest.mark.parametrize("suspects", [{"n1"}, {"n2"}])
def test_what_happens_on_a_node_in_ill_repute_proves_nothing(suspects: set[str]) -> None:
    detail = "the trainer exited with code 1: a"
    before = (claimed(1, node="n1"), committed(10, 1), end(1, EndReason.APP_ERROR, 13, detail))
    state = state_after(*before, claimed(2, node="n2"))

    assert outcome(state, exited(2, "a")) is not None
    assert outcome(state, exited(2, "a"), frozenset(suspects)) is None


def test_a_configuration_that_a_node_in_ill_repute_refuses_is_tried_elsewhere() -> None:
    state = state_after(claimed(1, node="bad"))
    refused = Exited(at=NOW, attempt=1, code=78, error="BadInput: bf16 is not supported by this GPU")

    (ended,) = advance(state, refused, POLICY, {"bad"})

    assert isinstance(ended, Ended)
    assert ended.reason is EndReason.BAD_CONFIG
    queued = apply(state, ended)
    assert avoided(queued) == Avoided(node="bad", because="its last attempt stalled there")
    again = apply(queued, claimed(2, node="n2"))
    assert outcome(again, replace(refused, attempt=2), frozenset({"bad"})) == refused.error


def test_a_hang_at_the_same_step_on_two_nodes_however_long_it_was() -> None:
    before = (
        claimed(1, node="n1"),
        committed(10, 1),
        end(1, EndReason.STALLED, 13, "the trainer hung and was killed: nothing happened for 601 s"),
    )
    state = state_after(*before, claimed(2, node="n2"))
    hung = Exited(at=NOW, attempt=2, code=-9, evidence=Evidence(hung_s=640.0), step=13)

    said = outcome(state, hung)

    assert said is not None
    assert said.endswith(ADVICE[EndReason.STALLED])


def test_a_loss_that_is_not_finite_at_the_same_step_twice_needs_no_second_node() -> None:
    before = (claimed(1), committed(10, 1), end(1, EndReason.NAN_LOSS, 13, "step 14: loss nan"))
    state = state_after(*before, claimed(2))

    said = outcome(state, exited(2, "Diverged: step 14: loss inf", "Diverged"))

    assert said is not None
    assert "the same at step 13 twice (step 10): lower base.learning_rate" in said


def test_advice_is_not_given_twice() -> None:
    advice = ADVICE[EndReason.OOM_GPU]

    assert advised(EndReason.OOM_GPU, f"no ({advice})") == f"no ({advice})"
    assert advised(EndReason.OOM_GPU, "no") == f"no: {advice}"
    assert advised(EndReason.APP_ERROR, "no") == "no"


REASONS = st.sampled_from(sorted(EndReason))


@given(
    st.lists(st.tuples(REASONS, st.sampled_from(["n1", "n2"]), st.integers(0, 2)), min_size=1, max_size=12)
)
def test_a_free_end_is_never_proof_and_one_end_alone_is_neither(
    history: list[tuple[EndReason, str, int]],
) -> None:
    state = RunState()
    for number, (reason, node, step) in enumerate(history, 1):
        state = apply(state, claimed(number, node=node))
        ended = end(number, reason, step)
        why = proof(state, ended)
        if reason in FREE_ENDS or reason not in REPEATABLE or number == 1:
            assert why is None
        if why:
            assert any(a.ended and a.ended.reason is reason for a in state.attempts[:-1])
        assert proof(state, ended, {"n1", "n2"}) is None
        state = apply(state, ended)
    assert phase(state) == "QUEUED"


def test_an_agent_that_ray_ended_for_want_of_memory_is_no_preemption() -> None:
    """Its run may be what takes the memory: tried for ever, it would end one agent after the other."""
    slot = Slot(slot="n1/0", node="n1", up_since=0.0, health=Health.GONE, out_of_memory=True)

    ended_by_ray = loss(slot, 0.0, 90.0)
    assert ended_by_ray is not None
    assert ended_by_ray[0] is EndReason.OOM_HOST

    state, attempts = RunState(), 0
    while not state.finished:
        attempts += 1
        state = apply(state, claimed(attempts, node=f"n{attempts}"))
        lost = Lost(at=NOW, attempt=attempts, reason=ended_by_ray[0], detail=ended_by_ray[1], step=attempts)
        state = reduce(apply, advance(state, lost, POLICY), state)
    assert attempts == 2
    assert ADVICE[EndReason.OOM_HOST] in state.finished.detail
