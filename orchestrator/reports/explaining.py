"""Why a run waits, why it is where it is, and why it was tried again: in plain sentences. Pure.

What its log says is told also without a controller; why it waits for a slot only a controller knows.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from storage.records import Outcome
from storage.run_state import FREE_ENDS, Attempt, RunState

from ..control.lifecycle import Policy, wait
from ..control.placing import Hold, Outlook, SlotNote, Standing
from .why import cause, date_and_time, shown_line


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What there is to say about a run now. Each is a sentence, or empty."""

    now: str
    """Where it is, and if it waits, for what."""
    there: str = ""
    """Why its newest attempt went to its node."""
    again: str = ""
    """What the end of its last attempt means for it."""

    @property
    def lines(self) -> tuple[str, ...]:
        return tuple(shown_line(line) for line in (self.now, self.there, self.again) if line)


def explain(
    state: RunState,
    policy: Policy,
    outlook: Outlook | None,
    now: float,
    *,
    resume: str,
    at: Callable[[float], str] = date_and_time,
) -> Explanation:
    """Return the sentences about a run.

    Args:
        outlook: What the sweep's controller thinks; None: none was reached.
        now: Unix seconds; used where no controller was reached.
        resume: The command that starts a controller.
    """
    return Explanation(
        now=_now(state, policy, outlook, now, resume, at),
        there=_there(state, at),
        again=_again(state, policy),
    )


def _now(
    state: RunState,
    policy: Policy,
    outlook: Outlook | None,
    now: float,
    resume: str,
    at: Callable[[float], str],
) -> str:
    if state.finished:
        detail = f": {state.finished.detail}" if state.finished.detail else ""
        return f"It is over: {state.finished.outcome} at step {state.finished.step}{detail}."
    if outlook and outlook.hold in (Hold.LOG_DAMAGED, Hold.LOG_UNREADABLE):
        return f"{_held(outlook)}."
    if running := state.running:
        doing = "trains" if running.started else "is starting"
        stopping = ", and is to be cancelled" if state.cancel_requested else ""
        gone = _of_its_slot(running, outlook)
        return f"Attempt {running.number} {doing} on {running.claimed.node}{gone}{stopping}."
    if state.cancel_requested:
        return "It is to be cancelled: the controller says so in its log next."
    if outlook and outlook.hold:
        return f"It waits: {_held(outlook, wait(state, policy).because)}."
    if outlook:
        return "It is about to be placed, or to be over."
    return f"It waits, and no controller was reached: {_rest(state, policy, now)}start one with {resume}."


def _held(outlook: Outlook, because: str = "") -> str:
    match outlook.hold:
        case Hold.NOT_DUE:
            return f"for another {outlook.for_s:.0f} s, because {because or 'its last attempt failed'}"
        case Hold.NO_SLOT:
            return f"no slot is free; {summary(outlook.slots)}"
        case Hold.LIMIT:
            return "as many runs train as resources.max_concurrent allows"
        case Hold.OUTRANKED:
            runs = "1 run is" if outlook.ahead == 1 else f"{outlook.ahead} runs are"
            slots = "1 free slot" if outlook.free == 1 else f"{outlook.free} free slots"
            return (
                f"{runs} placed before it, on {slots} "
                "(runs with committed work come first, then the order of the sweep)"
            )
        case Hold.DRAINS_UNKNOWN:
            return "the store has not said yet which nodes are drained, and nothing is placed before that"
        case Hold.LOG_UNREADABLE:
            return f"Its log cannot be read now, and is tried again: {outlook.problem}"
        case Hold.LOG_DAMAGED:
            return f"Its log is damaged, and nobody can go on with it: {outlook.problem}"
        case _:
            return "a slot is free for it, it is placed with the next look"


def summary(notes: Sequence[SlotNote]) -> str:
    """Return what keeps slots from being free, in a few words."""
    if not notes:
        return "the cluster has none: no node with room for a run has joined"
    there = [note for note in notes if note.standing is not Standing.GONE]
    if not there:
        return f"all {len(notes)} that there were are gone with their nodes"
    counts = Counter(_kept_by(note) for note in there)
    total = "of 1 slot" if len(there) == 1 else f"of {len(there)} slots"
    return f"{total}, {', '.join(f'{count} {kept_by}' for kept_by, count in counts.most_common(6))}"


def _kept_by(note: SlotNote) -> str:
    match note.standing:
        case Standing.BUSY:
            return "trains another run"
        case Standing.DRAINED:
            return f"is drained ({note.node})"
        case Standing.SILENT:
            return f"is silent ({note.node})"
        case Standing.BARRED:
            return f"is not used ({note.node}{': ' + note.detail if note.detail else ''})"
        case _:
            return "is free"


def _of_its_slot(running: Attempt, outlook: Outlook | None) -> str:
    """What is wrong with the slot that trains the run, if anything is."""
    slots = outlook.slots if outlook else ()
    note = next((note for note in slots if note.slot == running.claimed.slot), None)
    match note.standing if note else None:
        case Standing.SILENT:
            assert note
            return f", which has been silent for {note.silent_s:.0f} s and may be training all the same"
        case Standing.GONE:
            return ", which is gone: a new attempt follows"
        case Standing.DRAINED:
            return ", which is drained: it is asked to save itself and end"
        case _:
            return ""


def _rest(state: RunState, policy: Policy, now: float) -> str:
    """How long it would have to wait anyway."""
    ended = state.attempts[-1].ended if state.attempts else None
    pause = wait(state, policy)
    left_s = min(pause.seconds, ended.at + pause.seconds - now) if ended else 0.0
    return f"it may be placed in {left_s:.0f} s, because {pause.because}; " if left_s > 0 else ""


def _there(state: RunState, at: Callable[[float], str]) -> str:
    if not state.attempts:
        return ""
    claimed = state.attempts[-1].claimed
    because = claimed.because or "why was not recorded"
    return f"Attempt {claimed.attempt} went to {claimed.node} at {at(claimed.at)}: {because}."


def _again(state: RunState, policy: Policy) -> str:
    """What the newest end of an attempt meant."""
    ends = [attempt for attempt in state.attempts if attempt.ended]
    if not ends:
        return ""
    last = ends[-1]
    assert last.ended
    told = f"Attempt {last.number} ended with {last.ended.reason} ({cause(last.ended, last.claimed.node)})"
    if last.ended.reason in FREE_ENDS:
        return f"{told}: no fault of the run, which costs it nothing."
    if last.committed_step is not None:
        return f"{told}: it had committed step {last.committed_step}, so nothing counts against the run."
    if not state.stalls:
        return f"{told}: a stall, but a checkpoint was committed since, so nothing counts any more."
    limit = "" if state.outcome is Outcome.FAILED else f"; at {policy.max_failures} the run is given up"
    return f"{told}: a stall, {'the first' if state.stalls == 1 else f'{state.stalls} in a row'}{limit}."
