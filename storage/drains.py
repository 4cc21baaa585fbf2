"""Which nodes a person wants left alone by a sweep: records of a log, and what they mean. Pure.

    state = reduce(fold, entries, Drains())

A drain holds until it is lifted, whoever the controller is, and also for a node that comes back under its
name. It is about the sweep's own attempts: a node's other work is not ours.
"""

from dataclasses import dataclass
from typing import Annotated, Literal, assert_never

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from .records import Entry

NodeName = Annotated[str, Field(min_length=1, max_length=255)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DrainAsked(_Frozen):
    """Nothing new goes to the node, and what trains there saves itself and ends within ``grace_s``."""

    kind: Literal["drain_asked"] = "drain_asked"
    node: NodeName
    grace_s: Annotated[float, Field(ge=0)]
    at: float


class DrainLifted(_Frozen):
    """The node may be used again, also if its own failures spoke against it until then."""

    kind: Literal["drain_lifted"] = "drain_lifted"
    node: NodeName
    at: float


DrainRecord = Annotated[DrainAsked | DrainLifted, Field(discriminator="kind")]
DrainEntry = Entry[DrainRecord]
DRAIN_ENTRY: TypeAdapter[DrainEntry] = TypeAdapter(DrainEntry)
"""Reads and validates one entry of a sweep's log of drains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drains:
    """The drains that hold now, and what was lifted last on each node."""

    asked: tuple[DrainAsked, ...] = ()
    lifted: tuple[DrainLifted, ...] = ()

    def of(self, node: str) -> DrainAsked | None:
        return next((drain for drain in self.asked if drain.node == node), None)


def fold(state: Drains, entry: DrainEntry) -> Drains:
    """Return the state after one more entry."""
    record = entry.record
    asked = tuple(drain for drain in state.asked if drain.node != record.node)
    lifted = tuple(lift for lift in state.lifted if lift.node != record.node)
    match record:
        case DrainAsked():
            return Drains(asked=(*asked, record), lifted=lifted)
        case DrainLifted():
            return Drains(asked=asked, lifted=(*lifted, record))
        case _:
            assert_never(record)


def refusal(state: Drains, record: DrainRecord) -> str | None:
    """Nothing is refused: the last word counts."""
    return None


def holds(state: Drains, record: DrainRecord) -> bool:
    """Say whether this is so already."""
    drain = state.of(record.node)
    if isinstance(record, DrainAsked):
        return drain is not None and drain.grace_s == record.grace_s
    return drain is None and any(lift == record for lift in state.lifted)  # each also pardons what was before
