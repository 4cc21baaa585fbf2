"""The records of a run's log: the only durable facts about a run.

Each is a past-tense fact, written once at the next free position of the log. ``at`` is the writer's clock in
Unix seconds: it is shown to people and never used to order anything. What follows from a sequence of records
is decided in ``run_state``.
"""

from enum import StrEnum
from typing import Annotated, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

MAX_RECORD_BYTES = 1_000_000
"""Larger log objects are refused unread: the store is trusted only as far as checksums go."""

Step = Annotated[int, Field(ge=0)]
AttemptNumber = Annotated[int, Field(ge=1)]
Incarnation = Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class EndReason(StrEnum):
    """Why an attempt ended. Bounded, so that it can label a metric."""

    SPOT_NOTICE = "SPOT_NOTICE"
    NODE_LOST = "NODE_LOST"
    NODE_UNREACHABLE = "NODE_UNREACHABLE"
    AGENT_LOST = "AGENT_LOST"
    SUPERSEDED = "SUPERSEDED"
    DRAINED = "DRAINED"
    STORAGE_DOWN = "STORAGE_DOWN"
    HUB_DOWN = "HUB_DOWN"
    DISK_FULL = "DISK_FULL"
    APP_ERROR = "APP_ERROR"
    BAD_CONFIG = "BAD_CONFIG"
    KILLED = "KILLED"
    CKPT_INVALID = "CKPT_INVALID"
    OOM_GPU = "OOM_GPU"
    OOM_HOST = "OOM_HOST"
    CUDA_ERROR = "CUDA_ERROR"
    STALLED = "STALLED"
    NAN_LOSS = "NAN_LOSS"
    NODE_UNFIT = "NODE_UNFIT"
    USER_CANCEL = "USER_CANCEL"


class Outcome(StrEnum):
    """How a run ended."""

    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Packed(_Frozen):
    """How a file lies in the store if not as it is: coded, without loss, to fewer bytes."""

    codec: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,31}$")]
    size_bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256


class StoredFile(_Frozen):
    """One file of a checkpoint: its path inside the checkpoint, its size and its digest."""

    name: str
    size_bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256
    packed: Packed | None = None
    """The object in the store is this coding of the file; None: it is the file."""


class CheckpointRef(_Frozen):
    """Names one checkpoint of a run: an attempt commits each step at most once."""

    step: Step
    attempt: AttemptNumber

    def __str__(self) -> str:
        return f"step {self.step} (attempt {self.attempt})"


class Claimed(_Frozen):
    """An attempt may run, on this slot; every older attempt is fenced from here on.

    ``incarnation`` is random: it makes the attempt's data prefix unlike any other, even on a store where
    two claims could both appear to win.
    """

    kind: Literal["claimed"] = "claimed"
    attempt: AttemptNumber
    incarnation: Incarnation
    node: str
    slot: str
    because: str = ""
    """Why there, in words."""
    at: float


class Started(_Frozen):
    """The attempt finished its first step, having resumed from ``step`` (0: from the beginning)."""

    kind: Literal["started"] = "started"
    attempt: AttemptNumber
    step: Step
    at: float


class Committed(_Frozen):
    """A checkpoint exists: its files are in the store under the attempt's prefix, with these digests.

    One that is not ``resumable`` is a *salvage*: the adapter without the optimizer's state, all there was
    time for. It can be exported, and nothing is ever resumed from it.
    """

    kind: Literal["committed"] = "committed"
    attempt: AttemptNumber
    incarnation: Incarnation
    step: Step
    files: tuple[StoredFile, ...]
    metrics: dict[str, float] = {}
    final: bool = False
    resumable: bool = True
    at: float

    @property
    def ref(self) -> CheckpointRef:
        return CheckpointRef(step=self.step, attempt=self.attempt)


class Ended(_Frozen):
    """An attempt is over without the run being over.

    ``step`` is the last step it was seen to reach, ``silent_s`` how long it had not been heard of when its
    end was noticed, ``step_s`` its seconds per step: together they say what the end cost. ``saved_s`` is what
    it took, once it was asked to stop, to bring its last checkpoint into the store, and ``memory_bytes`` the
    size of the memory that it ran out of.
    """

    kind: Literal["ended"] = "ended"
    attempt: AttemptNumber
    reason: EndReason
    detail: str = ""
    step: Step = 0
    exit_code: int | None = None
    silent_s: float = 0.0
    step_s: float = 0.0
    saved_s: Annotated[float, Field(ge=0)] | None = None
    memory_bytes: Annotated[int, Field(ge=0)] | None = None
    at: float


class Retired(_Frozen):
    """These checkpoints may never be read again; their data goes after the grace period."""

    kind: Literal["retired"] = "retired"
    checkpoints: tuple[CheckpointRef, ...]
    at: float


class Reaped(_Frozen):
    """The data of these retired checkpoints is deleted."""

    kind: Literal["reaped"] = "reaped"
    checkpoints: tuple[CheckpointRef, ...]
    at: float


class Quarantined(_Frozen):
    """This checkpoint could not be used: nobody may resume from it.

    With an ``attempt``, it is that attempt's word, from one node: about the only restorable checkpoint it
    takes effect once others have said the same, see ``run_state``.
    """

    kind: Literal["quarantined"] = "quarantined"
    checkpoint: CheckpointRef
    attempt: AttemptNumber | None = None
    reason: str
    at: float


class Pinned(_Frozen):
    """A person wants this checkpoint kept, whatever the policy says."""

    kind: Literal["pinned"] = "pinned"
    checkpoint: CheckpointRef
    at: float


class Unpinned(_Frozen):
    """The policy decides about this checkpoint again."""

    kind: Literal["unpinned"] = "unpinned"
    checkpoint: CheckpointRef
    at: float


class CancelRequested(_Frozen):
    """A person asked for the run to stop. It stays queued or running until ``Finished`` says otherwise."""

    kind: Literal["cancel_requested"] = "cancel_requested"
    at: float


class Finished(_Frozen):
    """The run is over. Nothing but pinning, retiring and reaping may follow."""

    kind: Literal["finished"] = "finished"
    outcome: Outcome
    detail: str = ""
    step: Step = 0
    at: float


Record = Annotated[
    Claimed
    | Started
    | Committed
    | Ended
    | Retired
    | Reaped
    | Quarantined
    | Pinned
    | Unpinned
    | CancelRequested
    | Finished,
    Field(discriminator="kind"),
]


R = TypeVar("R")


class Entry(_Frozen, Generic[R]):
    """One object of a log: a record at its position, chained to the one before.

    ``nonce`` is random per append, by which a writer recognises its own record after a lost reply. ``prev``
    is the sha256 of the previous entry's bytes ("" at 0), so an entry that a lying store let somebody replace
    is noticed by the next reader.
    """

    seq: Annotated[int, Field(ge=0)]
    nonce: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    prev: str
    record: R

    def to_json(self) -> bytes:
        return self.model_dump_json().encode()


RunEntry = Entry[Record]
RUN_ENTRY: TypeAdapter[RunEntry] = TypeAdapter(RunEntry)
"""Reads and validates one entry of a run's log."""
RECORD: TypeAdapter[Record] = TypeAdapter(Record)
"""Validates one record, e.g. one that an agent hands to the controller to append."""
