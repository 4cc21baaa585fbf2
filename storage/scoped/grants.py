"""What a node without credentials may ask for, and whether it may have it: words and pure checks.

A *scoped* node works on one attempt of one run. It reads its run's spec and the checkpoint that it resumes
from; it writes under its attempt's own prefixes, each key once, with the length and digest that it named; and
it appends three kinds of record about its own attempt. Everything else is refused here, before anything is
signed, and again by the store's server, which checks the signature. It never lists and never deletes.

Who asks is known by what only the attempt's agent was told: its slot, attempt number and incarnation.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from .. import layout
from ..content.state import Stored
from ..errors import (
    AccessDenied,
    Corrupt,
    Fenced,
    InvalidName,
    NotFound,
    StorageError,
    Unavailable,
)
from ..packing import is_known
from ..records import (
    AttemptNumber,
    CheckpointRef,
    Committed,
    Incarnation,
    Quarantined,
    Record,
    Sha256,
    Started,
)
from ..run_state import RunState, holds
from ..s3.etag import of_parts

EXPIRES_S = 900
"""How long a signature holds. A request that has begun by then may last longer."""
MAX_CHECKPOINT_BYTES = 20 * 10**9
MAX_BATCH_BYTES = 8 << 20
"""Of events or log text; see ``trainer.shipper``, whose batches are half of that before redaction."""
MAX_SAMPLE_BYTES = 64 << 20
MAX_FILES = 1000
"""In one checkpoint."""
MIN_PART_BYTES = 5 << 20
"""S3 takes no smaller one but the last, and each is signed on its own."""
MAX_REASON_CHARACTERS = 2000
MAX_APPENDED_BYTES = 512_000
"""One record. A commit of ``MAX_FILES`` packed files says less, while their names have 200 characters."""
MAX_REQUEST_BYTES = 600_000
MAX_METRICS = 1000
MAX_METRIC_CHARACTERS = 200
"""In the name of a metric."""
MAX_LISTED = 250_000
"""Files and metrics of all checkpoints of a run that are not deleted: the controller remembers each."""
SALVAGES = 4
"""So many an attempt may have: it makes one when it is about to go, and one never retires while it runs."""
UNCOMMITTED_CHECKPOINTS = 3
"""As many whole checkpoints an attempt may have in the store without having committed them."""

Md5 = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Size = Annotated[int, Field(ge=0)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Caller(_Frozen):
    """Who asks."""

    run_id: str
    attempt: AttemptNumber
    incarnation: Incarnation
    slot: str


class Read(_Frozen):
    """A presigned GET of one object."""

    ask: Literal["read"] = "read"
    key: str


class Write(_Frozen):
    """A presigned PUT of exactly these bytes; of each part, if there are parts."""

    ask: Literal["write"] = "write"
    key: str
    size_bytes: Size
    md5: Md5
    part_bytes: Size = 0
    """All parts but the last are so large; 0: the object is written whole."""
    parts: Annotated[tuple[Md5, ...], Field(max_length=10_000)] = ()

    @property
    def etag(self) -> str:
        """What most servers call the object."""
        return of_parts(map(bytes.fromhex, self.parts)) if self.parts else self.md5

    def part_size(self, number: int) -> int:
        """How long a part is, counted from 1."""
        return min(self.part_bytes, self.size_bytes - (number - 1) * self.part_bytes)


class Head(_Frozen):
    """How large an object is that may be read."""

    ask: Literal["head"] = "head"
    key: str


class Find(_Frozen):
    """Where in the store the content of a digest lies."""

    ask: Literal["find"] = "find"
    digest: Sha256


class Complete(_Frozen):
    """All parts are sent: make the object of them."""

    ask: Literal["complete"] = "complete"
    key: str


class Append(_Frozen):
    """Verify a record and append it to the run's log."""

    ask: Literal["append"] = "append"
    record: Record


class Look(_Frozen):
    """The run's state."""

    ask: Literal["look"] = "look"


Asked = Annotated[Read | Head | Find | Write | Complete | Append | Look, Field(discriminator="ask")]


class Request(_Frozen):
    """What a node sends to the controller."""

    caller: Caller
    asked: Asked


class Granted(_Frozen):
    """Send this request. The url is a secret."""

    reply: Literal["granted"] = "granted"
    url: Annotated[str, Field(repr=False)]
    headers: Annotated[dict[str, str], Field(repr=False)] = {}


class GrantedParts(_Frozen):
    """Send these parts, then ask for completion; None: the part has arrived before."""

    reply: Literal["parts"] = "parts"
    parts: tuple[Granted | None, ...]


class Done(_Frozen):
    """It is so, or it was so already."""

    reply: Literal["done"] = "done"


class Told(_Frozen):
    """The run's state."""

    reply: Literal["told"] = "told"
    state: RunState


class Measured(_Frozen):
    """An object's size; None: there is none."""

    reply: Literal["measured"] = "measured"
    size_bytes: Size | None


class Found(_Frozen):
    """The incarnation of a content to read; None: it is not in the store."""

    reply: Literal["found"] = "found"
    stored: Stored | None


class Refused(_Frozen):
    """No, and why: raised at the node as the error of that name."""

    reply: Literal["refused"] = "refused"
    error: Literal["AccessDenied", "Corrupt", "Fenced", "InvalidName", "NotFound", "Unavailable"]
    reason: str

    def as_error(self) -> StorageError:
        return _ERRORS[self.error](self.reason)


Reply = Annotated[
    Granted | GrantedParts | Done | Told | Measured | Found | Refused, Field(discriminator="reply")
]
REQUEST: TypeAdapter[Request] = TypeAdapter(Request)
REPLY: TypeAdapter[Reply] = TypeAdapter(Reply)
_ERRORS: dict[str, type[StorageError]] = {
    kind.__name__: kind for kind in (AccessDenied, Corrupt, Fenced, InvalidName, NotFound, Unavailable)
}


def refused(error: StorageError) -> Refused:
    """The error as a reply."""
    name = type(error).__name__
    # A name that is none of ours is a kind of failure that the node can only wait out.
    return Refused.model_validate({"error": name if name in _ERRORS else "Unavailable", "reason": str(error)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one run's attempts may read beside its own files, and write at most."""

    max_checkpoint_bytes: int = MAX_CHECKPOINT_BYTES
    """One checkpoint, all its files; also everything else that an attempt ships, together."""
    last_step: int | None = None
    """A run has no later step."""
    inputs: frozenset[str] = frozenset()
    """Digests of the contents that the run is trained from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What has been granted to an attempt for one key."""

    write: Write
    until: float
    """Monotonic seconds: later the signature holds no more."""


def check_caller(state: RunState, caller: Caller) -> None:
    """Check that the one who asks is the attempt that runs now.

    Raises:
        Fenced: It is not (any more): an older attempt's ghost, another slot, or nobody we know.
    """
    running = state.running
    if running is None or running.number != caller.attempt:
        raise Fenced(
            f"{caller.run_id}: attempt {caller.attempt} is not running; the newest is {state.attempt}"
        )
    claimed = running.claimed
    if (claimed.incarnation, claimed.slot) != (caller.incarnation, caller.slot):
        raise Fenced(f"{caller.run_id}: attempt {caller.attempt} was not placed on this slot")


def check_read(state: RunState, caller: Caller, key: str, limits: Limits) -> None:
    """Check that a key is one that the attempt needs: its run's spec, its inputs, or what it resumes from.

    Raises:
        AccessDenied
    """
    content = layout.parse_content(key)
    if content and content[1] is not None and content[0] in limits.inputs:
        return
    allowed = {layout.run_spec(caller.run_id)}
    if newest := state.newest:
        allowed |= {layout.committed_file(caller.run_id, newest, file.name) for file in newest.files}
    if key not in allowed:
        raise AccessDenied(f"{key}: this attempt has no business reading it")


def check_write(state: RunState, caller: Caller, write: Write, limits: Limits) -> None:
    """Check that a key is the attempt's own, and that so many bytes may go there.

    Raises:
        InvalidName: More bytes than such an object may have, or parts that do not add up to it.
        AccessDenied: Somebody else's key, or a step that the attempt cannot commit.
    """
    key = layout.check_path(write.key)
    if data := layout.parse_data(key):
        if (data.run, data.attempt, data.incarnation) != (caller.run_id, caller.attempt, caller.incarnation):
            raise AccessDenied(f"{key}: not this attempt's prefix")
        if any(ref == data.ref for ref, _ in state.quarantined):
            raise AccessDenied(f"{key}: {data.ref} is quarantined, its files stay as they are")
        if data.step < state.committed_step:
            raise AccessDenied(f"{key}: step {state.committed_step} is committed already")
        if limits.last_step is not None and data.step > limits.last_step:
            raise AccessDenied(f"{key}: the run ends at step {limits.last_step}")
        most = limits.max_checkpoint_bytes
    elif batch := layout.parse_batch(key):
        if (batch.run, batch.attempt) != (caller.run_id, caller.attempt):
            raise AccessDenied(f"{key}: not this attempt's prefix")
        most = MAX_BATCH_BYTES
    elif sample := layout.parse_sample(key):
        if sample[0] != caller.run_id:
            raise AccessDenied(f"{key}: not this run's prefix")
        if limits.last_step is not None and sample[1] > limits.last_step:
            raise AccessDenied(f"{key}: the run ends at step {limits.last_step}")
        most = MAX_SAMPLE_BYTES
    else:
        raise AccessDenied(f"{key}: a scoped node may not write it")
    if write.size_bytes > most:
        raise InvalidName(
            f"{key}: {write.size_bytes} bytes, at most {most} are granted. "
            "Checkpoints: raise storage.max_checkpoint_bytes."
        )
    _check_parts(write)


def check_quota(state: RunState, write: Write, given: dict[str, Given], limits: Limits) -> None:
    """Check that the attempt does not fill the bucket with what it never commits.

    Args:
        given: What was granted to the attempt before and is not committed.

    Raises:
        AccessDenied: This checkpoint would be too large, or there were too many other files.
        Unavailable: Too many checkpoints are under way; older ones make room once their grants expire.
    """
    others = {key: each.write.size_bytes for key, each in given.items() if key != write.key}
    if len(others) >= 100 * MAX_FILES:
        raise AccessDenied(f"{write.key}: the attempt has written {len(others)} objects already")
    data = layout.parse_data(write.key)
    sizes = {key: size for key, size in others.items() if (layout.parse_data(key) is None) == (data is None)}
    if data is None:
        if sum(sizes.values()) + write.size_bytes > limits.max_checkpoint_bytes:
            raise AccessDenied(
                f"{write.key}: events, logs and samples of an attempt may have "
                f"{limits.max_checkpoint_bytes} bytes together"
            )
        return
    prefix = layout.checkpoint_prefix(data.run, data.attempt, data.incarnation, data.step)
    same = [size for key, size in sizes.items() if key.startswith(prefix)]
    if len(same) >= MAX_FILES or sum(same) + write.size_bytes > limits.max_checkpoint_bytes:
        raise AccessDenied(
            f"{write.key}: a checkpoint may have {limits.max_checkpoint_bytes} bytes in {MAX_FILES} files. "
            "Raise storage.max_checkpoint_bytes."
        )
    if sum(sizes.values()) + write.size_bytes > UNCOMMITTED_CHECKPOINTS * limits.max_checkpoint_bytes:
        raise Unavailable(f"{write.key}: too many checkpoints are under way; try again in {EXPIRES_S} s")


def check_record(state: RunState, caller: Caller, record: Record, limits: Limits) -> None:
    """Check that a record is one that an agent may append, about its own attempt. The log checks the rest.

    Raises:
        AccessDenied: It is the controller's to append, or about somebody else.
        InvalidName: It says more, or of more, than a record of its kind may.
        Fenced: It does not follow from what the run has done.
        Unavailable: So much is known of the run that some of it has to be deleted first.
    """
    if (size := len(record.model_dump_json().encode())) > MAX_APPENDED_BYTES:
        raise InvalidName(
            f"{caller.run_id}: {record.kind!r} takes {size} bytes, at most {MAX_APPENDED_BYTES}"
        )
    match record:
        case Started(attempt=attempt):
            running = state.running
            plausible = running is not None and record.step <= running.resumed_from
        case Committed(attempt=attempt, incarnation=incarnation):
            if incarnation != caller.incarnation:
                raise AccessDenied(f"{caller.run_id}: the checkpoint of another incarnation")
            _check_extent(state, caller, record, limits)
            layout.check_files(file.name for file in record.files)
            distinct = len(committed_sizes(caller.run_id, record)) == len(record.files) > 0
            plausible = distinct and (limits.last_step is None or record.step <= limits.last_step)
        case Quarantined(attempt=int(attempt)):
            plausible = len(record.reason) <= MAX_REASON_CHARACTERS and (
                holds(state, record) or _resumes_from(state, record.checkpoint)
            )
        case _:
            raise AccessDenied(f"{caller.run_id}: an agent may not append {record.kind!r}")
    if attempt != caller.attempt:
        raise AccessDenied(f"{caller.run_id}: {record.kind!r} about another attempt")
    if not plausible:
        raise Fenced(f"{caller.run_id}: {record.kind!r} does not follow from what the run has done")


def committed_sizes(run_id: str, committed: Committed) -> dict[str, int]:
    """The objects that a commit names, by key, and how large each is in the store."""
    return {
        layout.committed_file(run_id, committed, file.name): (
            file.packed.size_bytes if file.packed else file.size_bytes
        )
        for file in committed.files
    }


def named_keys(run_id: str, state: RunState) -> set[str]:
    """The keys that some record names: nothing there is ever replaced."""
    known = (*state.checkpoints, *state.salvaged, *state.retired)
    return {layout.committed_file(run_id, c, file.name) for c in known for file in c.files}


def replaceable(state: RunState, caller: Caller, key: str) -> bool:
    """Whether what lies at a key that the attempt may write is its own and named by no record.

    So it may be written anew with other bytes: a batch that has grown since its first try, or a file that is
    packed another way. Samples of steps before the attempt's first are an older attempt's.
    """
    if sample := layout.parse_sample(key):
        return state.running is not None and sample[1] > state.running.resumed_from
    return key not in named_keys(caller.run_id, state)


def abandoned(given: dict[str, Given], step: int, now: float) -> list[str]:
    """The keys of older steps that were never committed and that no signature reaches any more."""
    return [
        key
        for key, each in given.items()
        if (data := layout.parse_data(key)) and data.step < step and each.until <= now
    ]


def _check_extent(state: RunState, caller: Caller, record: Committed, limits: Limits) -> None:
    """Check that a commit takes no more memory here, and of those who fetch it no more disk, than it may."""
    if len(record.metrics) > MAX_METRICS or any(len(name) > MAX_METRIC_CHARACTERS for name in record.metrics):
        raise InvalidName(
            f"{caller.run_id}: {len(record.metrics)} metrics in a checkpoint; at most {MAX_METRICS} may have "
            f"names of at most {MAX_METRIC_CHARACTERS} characters: log fewer"
        )
    size_bytes = sum(file.size_bytes for file in record.files)
    if len(record.files) > MAX_FILES or size_bytes > limits.max_checkpoint_bytes:
        raise InvalidName(
            f"{caller.run_id}: {len(record.files)} files of {size_bytes} bytes, unpacked; "
            f"a checkpoint may have {limits.max_checkpoint_bytes} bytes in {MAX_FILES} files. "
            "Raise storage.max_checkpoint_bytes."
        )
    for file in record.files:
        if file.packed and not is_known(file.packed.codec):
            raise InvalidName(
                f"{file.name}: {file.packed.codec!r} is a codec that this version cannot unpack"
            )
    others = [c for c in (*state.stored, *state.retired) if c.ref != record.ref]
    if sum(len(c.files) + len(c.metrics) for c in (*others, record)) > MAX_LISTED:
        raise Unavailable(
            f"{caller.run_id}: its checkpoints have more than {MAX_LISTED} files and metrics; keep fewer"
        )
    salvages = sum(c.attempt == caller.attempt and not c.resumable for c in others)
    if not record.resumable and salvages >= SALVAGES:
        raise AccessDenied(f"{caller.run_id}: attempt {caller.attempt} has made {salvages} salvages already")


def _resumes_from(state: RunState, ref: CheckpointRef) -> bool:
    """Whether the running attempt may be finding out that it cannot resume from this checkpoint.

    That is the newest one, until the attempt has committed one itself. A pin does not change it: the data of
    a pinned checkpoint stays all the same, and a run must not be stuck at one that is damaged.
    """
    beginning = state.running is not None and state.running.committed_step is None
    return beginning and state.newest is not None and state.newest.ref == ref


def _check_parts(write: Write) -> None:
    if not write.parts and not write.part_bytes:
        return
    fits = write.part_bytes >= MIN_PART_BYTES and len(write.parts) == -(-write.size_bytes // write.part_bytes)
    if not fits or not write.parts:
        raise InvalidName(
            f"{write.key}: {len(write.parts)} parts of {write.part_bytes} bytes are not {write.size_bytes} "
            f"bytes in parts of at least {MIN_PART_BYTES}"
        )
