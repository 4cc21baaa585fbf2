"""The cluster as the controller sees it: slots, and what each was last heard to do.

``RayCluster`` is the real one. Everything here is a hint; only the logs are true.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from trainer.evidence import NO_EVIDENCE, Evidence, plausible

from ..notices.notice import Notice

if TYPE_CHECKING:  # which is made of what is here
    from .placing import Outlook, SlotNote

MAX_STEP = 10**9 - 1
MAX_ERROR_CHARACTERS = 2000


class Health(StrEnum):
    """What is known of a slot. UNKNOWN is not GONE: a slot that cannot be reached may be training."""

    ALIVE = "ALIVE"
    UNKNOWN = "UNKNOWN"
    GONE = "GONE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The attempt that a slot holds, running or just ended."""

    run_id: str
    attempt: int
    step: int = 0
    resumed_from: int = 0
    first_step_at: float | None = None
    step_s: float = 0.0
    loss: float | None = None
    exit_code: int | None = None
    """Set once the process is gone and what it saved is pushed."""
    error: str = ""
    evidence: Evidence = NO_EVIDENCE
    """What was seen of its end."""
    superseded: bool = False
    """The agent stopped it because the log has moved on to a newer attempt."""
    asked: bool = False
    """The agent asked it to stop while it ran: for a notice, or because it was told to."""
    notice: Notice | None = None
    """The agent stopped it because of this notice."""
    saved_s: float | None = None
    """From then until its last checkpoint was in the store; None if none came to be."""


def recordable(work: Work) -> Work:
    """What an agent reported, made such that a record can hold it: a trainer's numbers may be anything."""
    first_step_at = work.first_step_at
    said = {
        "step": min(max(work.step, 0), MAX_STEP),
        "resumed_from": min(max(work.resumed_from, 0), MAX_STEP),
        "first_step_at": first_step_at
        if first_step_at is not None and math.isfinite(first_step_at)
        else None,
        "step_s": work.step_s if 0 <= work.step_s < math.inf else 0.0,
        "error": work.error[:MAX_ERROR_CHARACTERS].encode(errors="replace").decode(),
        "saved_s": work.saved_s if work.saved_s is not None and 0 <= work.saved_s < math.inf else None,
        "evidence": plausible(work.evidence),
    }
    if all(getattr(work, name) == value for name, value in said.items()):
        return work  # as nearly always, of a thousand slots in each tick
    return replace(work, **said)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSpeed:
    """How fast a small object went from a node to the store and back, in bytes a second."""

    up: float
    down: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A place for one training process, and the last report from it."""

    slot: str
    node: str
    up_since: float
    health: Health
    silent_s: float = 0.0
    """Since it was last heard of."""
    node_lost: bool = False
    """GONE together with its node, not alone."""
    out_of_memory: bool = False
    """GONE, because it was ended for its node's want of memory."""
    preempted: bool = False
    """GONE, and its node was known to be about to be taken away."""
    notice: Notice | None = None
    """What its node was last told of its own end."""
    unheard: str = ""
    """Why its node cannot hear such notices."""
    unfit: str = ""
    """Why nothing could be trained there now: its agent has tried."""
    speed: StoreSpeed | None = None
    """As its agent has tried it, if it may."""
    work: Work | None = None

    def __post_init__(self) -> None:
        if self.work is not None:
            object.__setattr__(self, "work", recordable(self.work))

    @property
    def free(self) -> bool:
        busy = self.work is not None and self.work.exit_code is None
        return self.health is Health.ALIVE and not busy

    @property
    def ending(self) -> bool:
        """Its node was told to be about to end, or was a moment ago: nothing new goes there."""
        return self.notice is not None and self.notice.ends_node


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Train this attempt of this run. Repeating an order to the same slot changes nothing."""

    run_id: str
    attempt: int
    incarnation: str


class Listening:
    """Counts the seconds in which somebody listened.

    Silence is measured by this: who was frozen, or busy with a slow store, has heard of nobody meanwhile and
    may not take anybody for dead because of it.
    """

    def __init__(self, clock: Callable[[], float], longest_s: float) -> None:
        self._clock = clock
        self._longest_s = longest_s
        self._last = clock()
        self.seconds = 0.0

    def listen(self) -> None:
        """Count the time since the last call, up to ``longest_s`` of it."""
        now = self._clock()
        self.seconds += min(now - self._last, self._longest_s)
        self._last = now


class Cluster(Protocol):
    """Where training processes run."""

    def observe(self) -> tuple[Slot, ...]:
        """Every slot that is, was, or may be there; one that is missing from this has never existed here."""

    def start(self, slot: str, order: Order) -> None:
        """Ask the slot to train. A lost order is repeated by the controller."""

    def stop(self, slot: str, run_id: str, attempt: int, grace_s: float) -> None:
        """Ask the attempt to checkpoint and end within ``grace_s``; nothing if the slot holds another."""

    def close(self) -> None:
        """Dismiss every slot."""


class NoCluster:
    """A cluster without slots: for what a controller does when nothing is left to train."""

    def observe(self) -> tuple[Slot, ...]:
        return ()

    def start(self, slot: str, order: Order) -> None:
        raise LookupError(slot)

    def stop(self, slot: str, run_id: str, attempt: int, grace_s: float) -> None:
        raise LookupError(slot)

    def close(self) -> None:
        pass


class RemoteController(Protocol):
    """A sweep's controller as the command line reaches it."""

    def training(self) -> Mapping[str, Work]:
        """What slots hold right now, by run; empty if the controller does not answer."""

    def cancel(self, run_ids: Sequence[str]) -> None:
        """Ask runs to stop.

        Raises:
            OrchestrateError: The controller does not answer.
        """

    def notes(self) -> "Sequence[SlotNote]":
        """What is thought of each slot; empty if the controller does not answer."""

    def outlook(self, run_id: str) -> "Outlook | None":
        """What is thought of a run; None if the controller does not answer."""

    def drain(self, node: str, grace_s: float | None) -> None:
        """Ask for a node to be left alone, see ``draining.ask_to_drain``.

        Raises:
            OrchestrateError: The controller does not answer.
        """

    def append(self, run_id: str, body: bytes) -> str | None:
        """Ask for a record to be appended to a run's log; returns why the log refuses it, or None.

        Raises:
            OrchestrateError: The controller does not answer.
        """
