"""Which nodes fail the runs that are given to them: a fold of the runs' logs.

One run that stalls everywhere is at fault itself; several runs that stall on one node, and not elsewhere,
point at the node. Such a node is *quarantined*: it gets nothing for a while, then one run on *probation*. If
that stalls too the next pause is twice as long; a commit clears the node, and time does.

    trusted --several runs stall--> quarantined --pause over--> probation --a commit--> trusted
                                        ^                          |
                                        '------another stall-------'

A quarantine needs a contrast. Where every node fails its runs, or the only one does and no other was ever
seen to do better, it is not the nodes.

Nothing here reads a clock. Times are the caller's, by ages of records: a wrong clock makes a quarantine too
short or too long, and no more.
"""

import signal
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from storage.records import Ended, EndReason
from storage.run_state import FREE_ENDS, Attempt, RunState

HALF_LIFE_S = 7200.0
"""After so long a stall counts half."""
ENOUGH = 1.75
"""Two runs that failed there not long ago; or four that were killed, which anybody may have done."""
PAUSE_S = 300.0
LONGEST_PAUSE_S = 7200.0
JUDGE_EVERY_S = 30.0
"""Without news, nodes are judged so often: time alone clears one only after hours."""
SAME_S = 1.0
"""A pardon that is told again, as old by one clock as by another, is the same within so much."""

RUNS_OWN = frozenset({EndReason.NAN_LOSS, EndReason.BAD_CONFIG, EndReason.USER_CANCEL})
"""No node is to blame for these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """An attempt that failed on a node without any progress."""

    node: str
    run_id: str
    reason: EndReason
    claimed_at: float
    at: float
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Repute:
    """What is held against a node."""

    node: str
    until: float
    """Nothing goes there before; from then on, one run at a time."""
    strikes: int
    because: str


def blame(attempt: Attempt) -> float:
    """Return how much the end of an attempt says against its node."""
    ended = attempt.ended
    if ended is None or attempt.committed_step is not None:
        return 0.0
    if ended.reason in FREE_ENDS or ended.reason in RUNS_OWN:
        return 0.0
    return 0.5 if ended.reason is EndReason.AGENT_LOST or _killed(ended) else 1.0


def _killed(ended: Ended) -> bool:
    return ended.reason is EndReason.KILLED and ended.exit_code == -signal.SIGKILL


def pause_s(strikes: int) -> float:
    """Return how long a node gets nothing after so many failed probations and the first quarantine."""
    return float(min(PAUSE_S * 2.0 ** min(strikes - 1, 16), LONGEST_PAUSE_S))


def judged(
    stalls: Collection[Stall],
    progress: Mapping[str, Collection[str]],
    good: Mapping[str, float],
    nodes: Collection[str],
    now: float,
    pardons: Mapping[str, float] | None = None,
) -> dict[str, Repute]:
    """Return the nodes that are in ill repute.

    Args:
        progress: The nodes on which a run has committed something.
        good: When anything was last committed on a node.
        nodes: Those that could be given runs now.
        pardons: When an operator last cleared a node.
    """
    failed_on: dict[str, set[str]] = {}
    by_node: dict[str, list[Stall]] = {}
    for stall in stalls:
        failed_on.setdefault(stall.run_id, set()).add(stall.node)
        by_node.setdefault(stall.node, []).append(stall)

    def points_at_node(stall: Stall) -> bool:
        """The run did not fail elsewhere too, or it did well elsewhere."""
        others = set(progress.get(stall.run_id, ())) - {stall.node}
        return bool(others) or failed_on[stall.run_id] == {stall.node}

    found = {}
    for node, there_failed in by_node.items():
        since = max((times[node] for times in (good, pardons or {}) if node in times), default=float("-inf"))
        here = [stall for stall in there_failed if stall.at > since]
        repute = _of(node, sorted(filter(points_at_node, here), key=lambda s: s.at), now)
        if repute:
            found[node] = repute
    there = set(nodes)
    if len(there) > 1 and there <= found.keys():
        return {}  # they cannot all be broken: it is something that they share
    return {node: repute for node, repute in found.items() if (there | good.keys()) - {node}}


def _of(node: str, stalls: Iterable[Stall], now: float) -> Repute | None:
    counted: dict[str, Stall] = {}
    since, strikes = None, 0
    for stall in stalls:
        if since is None:
            counted[stall.run_id] = stall
            if sum(s.weight * 0.5 ** ((stall.at - s.at) / HALF_LIFE_S) for s in counted.values()) >= ENOUGH:
                since, strikes = stall.at, 1
        elif stall.claimed_at >= since + pause_s(strikes):  # what began before says nothing new
            since, strikes = stall.at, strikes + 1
            counted[stall.run_id] = stall
    if since is None or now > since + pause_s(strikes) + HALF_LIFE_S:
        return None
    reasons = ", ".join(sorted({s.reason for s in counted.values()}))
    return Repute(
        node=node,
        until=since + pause_s(strikes),
        strikes=strikes,
        because=f"{len(counted)} runs failed there ({reasons})",
    )


def barred(
    slots: Iterable[tuple[str, str]], taken: Collection[str], ill: Mapping[str, Repute], now: float
) -> dict[str, str]:
    """Return the slots that may not be given a run, and why.

    Args:
        slots: Each with its node, in the order in which they are tried. One that could be given no run anyway
            must not be among them: it would keep the others of its node waiting for its try.
        taken: Slots that have a run.
    """
    if not ill:
        return {}
    slots = list(slots)
    trying = {node for slot, node in slots if slot in taken}
    found = {}
    for slot, node in slots:
        repute = ill.get(node)
        if repute is None:
            continue
        if now < repute.until:
            found[slot] = f"{repute.because}; it gets a run to try in {repute.until - now:.0f} s"
        elif node in trying and slot not in taken:
            found[slot] = f"{repute.because}; one run at a time tries it"
        trying.add(node)
    return found


class NodeBook:
    """What a controller has read of nodes, kept such that each end is looked at once."""

    def __init__(self) -> None:
        self._stalls: list[Stall] = []
        self._progress: dict[str, set[str]] = {}
        self._good: dict[str, float] = {}
        self._pardons: dict[str, float] = {}
        self._noted: dict[str, int] = {}
        self._judged: dict[str, Repute] = {}
        self._judged_of: frozenset[str] = frozenset()
        self._judge_at = float("-inf")
        """When it is to be judged anew, though nothing was noted: ill repute passes with time."""

    def note(self, run_id: str, state: RunState, wall: float, now: float) -> None:
        """Read what is new in a run.

        Args:
            wall: Unix seconds, by which the ages of records are told.
        """
        noted = self._noted.get(run_id, 0)
        for attempt in state.attempts[noted:]:
            node = attempt.claimed.node
            if attempt.committed_step is not None:
                age_s = wall - (attempt.committed_at or wall)
                self._read_commit(run_id, node, now - max(0.0, age_s))
            if attempt.ended is None:
                return
            self._noted[run_id] = attempt.number
            if weight := blame(attempt):
                stall = Stall(
                    node=node,
                    run_id=run_id,
                    reason=attempt.ended.reason,
                    claimed_at=now - max(0.0, wall - attempt.claimed.at),
                    at=now - max(0.0, wall - attempt.ended.at),
                    weight=weight,
                )
                self._stalls.append(stall)
                self._judge_at = float("-inf")

    def _read_commit(self, run_id: str, node: str, at: float) -> None:
        progress = self._progress.setdefault(run_id, set())
        if node in self._judged or node not in self._good or node not in progress:
            self._judge_at = float("-inf")  # another commit where all is well changes no judgement
        progress.add(node)
        self._good[node] = max(at, self._good.get(node, at))

    def pardon(self, node: str, at: float) -> None:
        """Hold nothing against a node that happened before: an operator says that it is repaired."""
        if at - self._pardons.get(node, float("-inf")) > SAME_S:
            self._pardons[node] = at
            self._judge_at = float("-inf")

    def judged(self, nodes: Collection[str], now: float) -> dict[str, Repute]:
        """Return the nodes in ill repute; see ``judged``. Costs nothing while nothing has failed."""
        if not self._stalls:
            return {}
        there = frozenset(nodes)
        if now < self._judge_at and there == self._judged_of:
            return self._judged
        horizon = now - LONGEST_PAUSE_S - 4 * HALF_LIFE_S
        self._stalls = [stall for stall in self._stalls if stall.at > horizon]
        self._judged = judged(self._stalls, self._progress, self._good, nodes, now, self._pardons)
        self._judged_of, self._judge_at = there, now + JUDGE_EVERY_S
        return self._judged
