"""What a node was told of its end, as values, and the fold of what was polled. Pure: time is an argument.

    standing = after(standing, polled, now)     at every poll that was answered
    told(standing, now)                         what the agent acts on, and what the controller hears

      (nothing) --told--> ACTIVE --not told any more--> WITHDRAWN --calm for calm_s--> (nothing)
                            ^-----------told again-----------'

A notice counts at its first sight: five seconds may be all there is. One that is withdrawn counts until it
has not been told for a while, longer each time it happens: work that has moved away does not come back to a
node that cannot make up its mind.
"""

from dataclasses import dataclass, replace
from enum import StrEnum

CALM_S = 30.0
"""How long a notice must stay withdrawn before the node is used again; doubled each time."""
LONGEST_CALM_S = 600.0

UNSAID_S = 30.0
"""What is taken for the time left where nobody says: clouds and Kubernetes give at least this."""

MARGIN_S = 2.0
"""The node may go this much earlier than was said."""

LEAST_GRACE_S = 2.0

SOON_S = 600.0
"""Attempts train on until the end of their node is this near, which is enough to store any checkpoint."""


class Kind(StrEnum):
    """What is going to happen to the node. Bounded, so that it can label a metric."""

    TERMINATE = "terminate"
    """It is taken away."""
    MAINTENANCE = "maintenance"
    """It is restarted or moved: what runs there does not survive."""
    REBALANCE = "rebalance"
    """It is more likely than others to be taken away, some time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """One notice, as of the moment when this value was made."""

    kind: Kind
    source: str
    """Who says so, for people: ``AWS``."""
    detail: str = ""
    left_s: float | None = None
    """Seconds until the node is gone, below 0 once they are over; None: nobody said."""
    warning_s: float | None = None
    """What ``left_s`` was when the notice was first heard."""
    withdrawn: bool = False
    """It is not told any more, but was a moment ago."""

    @property
    def ends_node(self) -> bool:
        """Nothing may run there. Otherwise the node is only the last choice."""
        return self.kind is not Kind.REBALANCE

    @property
    def soon(self) -> bool:
        """What is trained there has to end now. Before that, only nothing new begins there."""
        imminent = self.left_s is None or self.left_s <= SOON_S
        return self.ends_node and not self.withdrawn and imminent

    @property
    def overdue(self) -> bool:
        """The node should be gone by now."""
        return self.ends_node and not self.withdrawn and self.left_s is not None and self.left_s <= 0

    @property
    def grace_s(self) -> float:
        """How long an attempt on the node may take to save itself."""
        left_s = UNSAID_S if self.left_s is None else self.left_s
        return max(left_s - MARGIN_S, LEAST_GRACE_S)

    def __str__(self) -> str:
        kind = "spot" if self.kind is Kind.TERMINATE else self.kind
        warning = "no time given" if self.warning_s is None else f"{max(self.warning_s, 0.0):.0f} s warning"
        return f"{kind} notice from {self.source}, {warning}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What stands of all that was polled so far. Times are by one clock of the node."""

    notice: Notice | None = None
    """As it was when it was first heard."""
    ends_at: float | None = None
    """The earliest end that was told."""
    withdrawn_at: float | None = None
    withdrawals: int = 0


def after(standing: Standing, polled: Notice | None, now: float) -> Standing:
    """Return what stands after one more answer; ``polled`` is None where nothing is announced."""
    current = standing.notice
    weaker = polled is not None and current is not None and current.ends_node and not polled.ends_node
    if polled is not None and not weaker:
        ends_at = None if polled.left_s is None else now + polled.left_s
        if current is None or current.kind is not polled.kind:
            first = replace(polled, warning_s=polled.left_s)
            return Standing(notice=first, ends_at=ends_at, withdrawals=standing.withdrawals)
        known = [at for at in (standing.ends_at, ends_at) if at is not None]
        return replace(standing, ends_at=min(known, default=None), withdrawn_at=None)
    if current is None:
        return standing
    if standing.withdrawn_at is None:
        return replace(standing, withdrawn_at=now, withdrawals=standing.withdrawals + 1)
    if now - standing.withdrawn_at < calm_s(standing.withdrawals):
        return standing
    return after(Standing(withdrawals=standing.withdrawals), polled, now)


def told(standing: Standing, now: float) -> Notice | None:
    """Return the notice that counts now, if there is one."""
    if standing.notice is None:
        return None
    return replace(
        standing.notice,
        left_s=None if standing.ends_at is None else standing.ends_at - now,
        withdrawn=standing.withdrawn_at is not None,
    )


def calm_s(withdrawals: int) -> float:
    """Return how long a node that was let off so often must be left in peace before it is used again."""
    return min(CALM_S * 2.0 ** min(max(withdrawals, 1) - 1, 64), LONGEST_CALM_S)
