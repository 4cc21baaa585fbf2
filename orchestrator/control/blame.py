"""Whose fault an end was: what it counts against, and when it proves that the run itself is at fault.

Preemptions are free, failures are stalls (``run_state.FREE_ENDS``), and so many stalls in a row end a run
whatever they were. Some ends say more than that, and end it at once:

* out of memory twice in a row, on memory of one size: a third time would be no different (on one node, if
  it was the trainer's own process that told so, or was killed for it);
* the same error at the same step on two nodes, none of which is in ill repute: it is not the machine;
* a loss that is not finite at the same step twice: what a step computes is the same everywhere.
"""

from collections.abc import Collection

from storage.records import Ended, EndReason
from storage.run_state import FREE_ENDS, Attempt, RunState
from trainer.evidence import ADVICE, LESS_MEMORY

OUT_OF_MEMORY = frozenset({EndReason.OOM_GPU, EndReason.OOM_HOST})

REPEATABLE = OUT_OF_MEMORY | {
    EndReason.APP_ERROR,
    EndReason.CUDA_ERROR,
    EndReason.STALLED,
    EndReason.NAN_LOSS,
}
"""Ends that a run brings about again wherever it is, if it is at fault."""

_WORDS_VARY = OUT_OF_MEMORY | {EndReason.STALLED, EndReason.NAN_LOSS}
"""Their messages carry addresses, sizes and times."""


def proof(state: RunState, ended: Ended, suspects: Collection[str] = ()) -> str | None:
    """Return why the run is at fault, if the end of its running attempt proves that; else None.

    Args:
        state: Before that end.
        suspects: Nodes in ill repute: what happens there proves nothing.
    """
    node = state.attempts[-1].claimed.node
    if node in suspects or ended.reason not in REPEATABLE:
        return None
    before = [a for a in state.attempts[:-1] if a.ended and a.claimed.node not in suspects]
    if ended.reason in OUT_OF_MEMORY and _too_small_again(state.attempts[-1], before, ended):
        of = f" of {ended.memory_bytes / 1e9:.1f} GB" if ended.memory_bytes else ""
        return f"out of memory twice, with memory{of}"
    same = [a for a in before if a.ended and _equal(a.ended, ended)]
    if ended.reason is EndReason.NAN_LOSS and same:
        return f"the same at step {ended.step} twice"
    if other := next((a.claimed.node for a in same if a.claimed.node != node), None):
        return f"the same at step {ended.step} on {other} and {node}"
    return None


def advised(reason: EndReason, detail: str) -> str:
    """Return the detail with what to do about it, unless it says so itself."""
    advice = ADVICE.get(reason)
    is_said = advice is None or advice in detail or LESS_MEMORY in detail
    return detail if is_said else f"{detail}: {advice}"


def _too_small_again(last: Attempt, before: list[Attempt], ended: Ended) -> bool:
    """Whether the last end that was not the machine's was the same, and nothing came of this attempt."""
    own = [a for a in before if a.ended and a.ended.reason not in FREE_ENDS]
    earlier = own[-1].ended if own else None
    if last.committed_step is not None or earlier is None or earlier.reason is not ended.reason:
        return False
    if own[-1].claimed.node == last.claimed.node and None in (earlier.exit_code, ended.exit_code):
        return False  # the agent was ended, not the trainer: a neighbour may be what takes the memory there
    sizes = {earlier.memory_bytes, ended.memory_bytes}
    return None in sizes or len(sizes) == 1


def _equal(one: Ended, other: Ended) -> bool:
    same_words = one.detail == other.detail or one.reason in _WORDS_VARY
    return (one.reason, one.step) == (other.reason, other.step) and same_words
