"""An append-only log of records in an object store, which any number of processes may read and append to.

Entry n is the object ``<prefix><n>.json``, written only if that key is free: of several writers exactly one
gets position n, the others read what is there, and find out whether their record is still admitted.
Positions have no gaps and each entry carries the digest of the one before, so an entry that was lost or
replaced is noticed.

A writer that gets no reply to an append reads the position back and knows its own entry by its nonce.

A log may start from a ``Snapshot``, which saves reading what came before it. It is a cache: an entry that
does not follow from it makes it worthless, and the log is then read from the beginning.
"""

import hashlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from . import layout
from .errors import (
    Corrupt,
    Fenced,
    InvalidName,
    NotFound,
    Unavailable,
)
from .object_store import ObjectStore
from .records import (
    MAX_RECORD_BYTES,
    RUN_ENTRY,
    Entry,
    Record,
)
from .run_state import (
    RunState,
    fold,
    holds,
    refusal,
)

S = TypeVar("S")
R = TypeVar("R", bound=BaseModel)

PAUSES_S = (0.1, 0.3, 1.0, 3.0)
"""How long an append waits before it asks a store that did not answer again."""
READERS = 8
"""How many entries of a log that is far behind are read at once."""
READ_AT_ONCE = 256
"""How many are asked for before the first of them is looked at."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot(Generic[S]):
    """What a log says up to a position: the digest of the last entry's bytes, and the state they fold to."""

    next_seq: int
    digest: str
    state: S


@dataclass(slots=True)
class _Position(Generic[S, R]):
    """How far a log has been read."""

    read: Snapshot[S]
    """Replaced as a whole, so that it may be looked at while others read on."""
    from_snapshot: bool = False
    proven: bool = True
    """The entry before this position, or one after it, has the digest that the snapshot says."""
    first: int = 0
    """The position of the oldest entry in ``entries``, or of the next one."""
    entries: list[Entry[R]] = field(default_factory=list)

    @property
    def next_seq(self) -> int:
        return self.read.next_seq


class Log(Generic[S, R]):
    """One log and the state that follows from it. Safe to use from many threads.

    Args:
        prefix: Keys of the entries start with it, see ``layout.run_log_prefix``.
        entry: Reads one entry, with whatever records this log holds.
        fold: The state after one more entry.
        refusal: Why a record may not be appended in a state, or None if it may.
        holds: Whether a state already contains a record, so that appending it again is a no-op.
        sleep: Waits between tries.
        pauses_s: How long an append waits before each further try; None: ``PAUSES_S``.
        hint: Finds a snapshot, or None, when the log is first read; it does not raise.
        readers: See ``READERS``.
        remember: Keep the entries in memory for ``entries``, which otherwise reads them again.
    """

    def __init__(
        self,
        store: ObjectStore,
        prefix: str,
        *,
        entry: TypeAdapter[Entry[R]],
        initial: S,
        fold: Callable[[S, Entry[R]], S],
        refusal: Callable[[S, R], str | None],
        holds: Callable[[S, R], bool] = lambda state, record: False,
        sleep: Callable[[float], None] = time.sleep,
        pauses_s: tuple[float, ...] | None = None,
        hint: Callable[[], Snapshot[S] | None] = lambda: None,
        readers: int = READERS,
        remember: bool = True,
    ) -> None:
        self._store = store
        self._prefix = prefix
        self._entry = entry
        self._empty = Snapshot(next_seq=0, digest="", state=initial)
        self._fold = fold
        self._refusal = refusal
        self._holds = holds
        self._sleep = sleep
        self._pauses_s = pauses_s
        self._hint = hint
        self._readers = readers
        self._remember = remember
        self._at: _Position[S, R] = _Position(self._empty)
        self._read_once = False
        self._lock = threading.RLock()

    @property
    def state(self) -> S:
        """The state as of the last ``refresh`` or ``append``; reads nothing."""
        return self._at.read.state

    @property
    def next_seq(self) -> int:
        """The position after the last entry read."""
        return self._at.next_seq

    def entries(self) -> tuple[Entry[R], ...]:
        """All entries read so far, oldest first. Those that a snapshot spared are read now.

        Raises:
            StorageError: See ``refresh``; only of a log that has forgotten entries, or never read them.
        """
        with self._lock:
            if self._at.first:
                self._remember = True
                self._read_again()
            return tuple(self._at.entries)

    def snapshot(self) -> Snapshot[S] | None:
        """What has been read so far, for ``adopt`` by another process; None of a log without entries."""
        read = self._at.read
        return read if read.next_seq else None

    def adopt(self, snapshot: Snapshot[S]) -> None:
        """Start from a snapshot, unless as much has been read already. Reads nothing."""
        with self._lock:
            if snapshot.next_seq > self._at.next_seq:
                self._at = _Position(snapshot, from_snapshot=True, proven=False, first=snapshot.next_seq)

    def refresh(self) -> S:
        """Read what was appended since, and return the state.

        Raises:
            Corrupt: An entry is missing, unreadable, or not the successor of the one before. Nobody may go on
                from such a log.
            AccessDenied, Unavailable
        """
        with self._lock:
            if not self._read_once and (found := self._hint()):
                self.adopt(found)
            try:
                self._read_on(self._at)
            except Corrupt as error:
                self._distrust(error)
            self._read_once = True
            return self.state

    def proven(self) -> S:
        """The state as last read; of a log that is known from a snapshot alone, after a look at whether its
        last entry is what that says. Whoever deletes goes by this: no snapshot's word may cost data.

        Raises:
            StorageError: See ``refresh``.
        """
        with self._lock:
            self._prove()
            return self.state

    def append(self, record: R) -> S:
        """Append a record, unless the log already holds it, and return the state after it.

        Raises:
            Fenced: The log does not admit the record (any more).
            InvalidName: It is too large for a log, and nothing was written: no reader would go past it.
            Unavailable: The store does not answer. The record may have been written: append it again later.
            Corrupt: See ``refresh``.
            AccessDenied
        """
        with self._lock:
            self._append(record, None)
            return self.state

    def append_as(self, seq: int, record: R) -> bool:
        """Append a record as the entry of this position, or not at all.

        For what was decided by the entries before: were it appended after another's, it could say of a state
        what is no longer so, and still be admitted.

        Returns:
            Whether the log says so now, and nothing that came between: if not, what did has been read.

        Raises:
            See ``append``.
        """
        with self._lock:
            return self._append(record, seq)

    def _append(self, record: R, seq: int | None) -> bool:
        if not self._read_once:
            self.refresh()
        self._prove()
        nonce = secrets.token_hex(16)
        while not self._already_holds(record):
            at = self._at
            if seq is not None and at.next_seq != seq:
                return False
            entry = Entry(seq=at.next_seq, nonce=nonce, prev=at.read.digest, record=record)
            if self._create(entry) or self._take(at, self._body(entry.seq)).nonce == nonce:
                return True
        return self.next_seq == seq

    def _distrust(self, error: Corrupt) -> None:
        """Read the log from its beginning if it is only the snapshot that it does not agree with.

        Raises:
            Corrupt: It did not begin at a snapshot, or is damaged all the same.
        """
        if not self._at.from_snapshot:
            raise error
        logger.warning("%s: does not follow from its snapshot, and is read again: %s", self._prefix, error)
        self._read_again()

    def _read_again(self) -> None:
        """Read the log from its beginning. Until that is done, ``state`` stays as it is."""
        again: _Position[S, R] = _Position(self._empty)
        try:
            self._read_on(again)
        except Corrupt:
            self._at = again
            raise
        self._at = again

    def _prove(self) -> None:
        """Make sure that what the snapshot says was the last entry is: an append would be chained to it."""
        at = self._at
        if at.proven:
            return
        try:
            if _digest(self._body(at.next_seq - 1)) != at.read.digest:
                key = layout.log_entry(self._prefix, at.next_seq - 1)
                raise Corrupt(f"{self._named(key)}: is not what its snapshot says")
            at.proven = True
        except Corrupt as error:
            self._distrust(error)

    def _already_holds(self, record: R) -> bool:
        """Whether the log has this fact; if not, it may be appended.

        Raises:
            Fenced: It may not.
        """
        refused: str | None = None
        for stale in (True, False):
            if not stale:
                # What is known here may be old news: only the log's present end can refuse.
                self.refresh()
            if self._holds(self.state, record):
                return True
            refused = self._refusal(self.state, record)
            if refused is None:
                return False
        raise Fenced(f"{self._prefix}: {getattr(record, 'kind', 'the record')} is refused: {refused}")

    def _create(self, entry: Entry[R]) -> bool:
        """Write an entry at its position; False if the position is taken, by whomever."""
        key, body = layout.log_entry(self._prefix, entry.seq), entry.to_json()
        if len(body) > MAX_RECORD_BYTES:
            kind = getattr(entry.record, "kind", "the record")
            raise InvalidName(
                f"{self._named(key)}: {kind} takes {len(body)} bytes, a log has at most {MAX_RECORD_BYTES} "
                "for a record: nothing was written; say less in it"
            )
        pauses_s = PAUSES_S if self._pauses_s is None else self._pauses_s
        for pause_s in (*pauses_s, None):
            try:
                if not self._store.create(key, body):
                    return False
                self._accept(self._at, entry, body)
                return True
            except Unavailable as error:
                if self._exists(key):
                    return False
                if pause_s is None:
                    tried = f" (tried {len(pauses_s) + 1} times)" if pauses_s else ""
                    raise Unavailable(f"{error}{tried}") from error
                # The same bytes again: should the lost request arrive late, it writes the same entry.
                self._sleep(pause_s)
        raise AssertionError("unreachable")

    def _exists(self, key: str) -> bool:
        try:
            return self._store.head(key) is not None
        except Unavailable:
            return False

    def _read_on(self, at: _Position[S, R]) -> None:
        for body in self._bodies(range(at.next_seq, self._end(at))):
            self._take(at, body)

    def _end(self, at: _Position[S, R]) -> int:
        """The position after the last entry that the store lists."""
        # Of a snapshot not even the position is believed: the entry before it must be there.
        end = at.next_seq if at.proven else at.next_seq - 1
        after = layout.log_entry(self._prefix, end - 1) if end else ""
        for info in self._store.list(self._prefix, after):
            seq = layout.parse_log_entry(self._prefix, info.key)
            if seq is None:
                continue
            if info.size_bytes > MAX_RECORD_BYTES:
                raise Corrupt(f"{self._named(info.key)}: {info.size_bytes} bytes is too large for a record")
            end = max(end, seq + 1)
        if end < at.next_seq:
            raise Corrupt(f"{self._prefix} in {self._store.url}: has no entry {end}, which its snapshot says")
        return end

    def _bodies(self, positions: range) -> Iterator[bytes]:
        """The bytes of these entries, in order."""
        if self._readers == 1 or len(positions) <= self._readers:
            yield from map(self._body, positions)
            return
        # Over a network reading a long log is waiting, not work.
        # Not all at once: the last position is what a listing claims, and an entry before it may be missing.
        with ThreadPoolExecutor(self._readers) as pool:
            for start in range(0, len(positions), READ_AT_ONCE):
                yield from pool.map(self._body, positions[start : start + READ_AT_ONCE])

    def _body(self, seq: int) -> bytes:
        key = layout.log_entry(self._prefix, seq)
        try:
            return self._store.get(key)
        except NotFound as error:
            raise Corrupt(f"{self._named(key)}: the entry is missing, though later ones exist") from error

    def _take(self, at: _Position[S, R], body: bytes) -> Entry[R]:
        """Fold the entry at the next position."""
        key = layout.log_entry(self._prefix, at.next_seq)
        try:
            entry = self._parsed(body)
        except (ValidationError, ValueError) as error:
            raise Corrupt(
                f"{self._named(key)}: not a record that this version understands: {_first_line(error)}"
            ) from error
        if entry.seq != at.next_seq:
            raise Corrupt(f"{self._named(key)}: says it is entry {entry.seq}")
        if entry.prev != at.read.digest:
            raise Corrupt(f"{self._named(key)}: does not follow from the entry before, which was replaced")
        self._accept(at, entry, body)
        return entry

    def _parsed(self, body: bytes) -> Entry[R]:
        if len(body) > MAX_RECORD_BYTES:
            raise ValueError(f"record is {len(body)} bytes, more than {MAX_RECORD_BYTES}")
        return self._entry.validate_json(body)

    def _accept(self, at: _Position[S, R], entry: Entry[R], body: bytes) -> None:
        state = self._fold(at.read.state, entry)
        at.read = Snapshot(next_seq=entry.seq + 1, digest=_digest(body), state=state)
        at.proven = True
        if self._remember:
            at.entries.append(entry)
        else:
            at.first = at.next_seq

    def _named(self, key: str) -> str:
        return f"{key} in {self._store.url}"


RunLog = Log[RunState, Record]
RunSnapshot = Snapshot[RunState]


def run_log(
    store: ObjectStore,
    run_id: str,
    *,
    sleep: Callable[[float], None] = time.sleep,
    pauses_s: tuple[float, ...] | None = None,
    hint: Callable[[], RunSnapshot | None] = lambda: None,
    readers: int = READERS,
    remember: bool = True,
) -> RunLog:
    """The log of one run. Nothing is read before the first ``refresh`` or ``append``."""
    return Log(
        store,
        layout.run_log_prefix(run_id),
        entry=RUN_ENTRY,
        initial=RunState(),
        fold=fold,
        refusal=refusal,
        holds=holds,
        sleep=sleep,
        pauses_s=pauses_s,
        hint=hint,
        readers=readers,
        remember=remember,
    )


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    return str(error)
