"""An append-only log of records in an object store, which any number of processes may read and append to.

Entry n is the object ``<prefix><n>.json``, written only if that key is free: of several writers exactly one
gets position n, the others read what is there, and find out whether their record is still admitted.
Positions have no gaps and each entry carries the digest of the one before, so an entry that was lost or
replaced is noticed.

A writer that gets no reply to an append reads the position back and knows its own entry by its nonce.
"""

import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from . import layout
from .errors import Corrupt, Fenced, NotFound, Unavailable
from .object_store import ObjectStore
from .records import MAX_RECORD_BYTES, RUN_ENTRY, Entry, Record
from .run_state import RunState, fold, holds, refusal

S = TypeVar("S")
R = TypeVar("R", bound=BaseModel)

PAUSES_S = (0.1, 0.3, 1.0, 3.0)
"""How long an append waits before it asks a store that did not answer again."""
_FEW = 8
_READERS = 8


class Log(Generic[S, R]):
    """One log and the state that follows from it. Safe to use from many threads.

    Args:
        prefix: Keys of the entries start with it, see ``layout.run_log_prefix``.
        entry: Reads one entry, with whatever records this log holds.
        fold: The state after one more entry.
        refusal: Why a record may not be appended in a state, or None if it may.
        holds: Whether a state already contains a record, so that appending it again is a no-op.
        sleep: Waits between tries.
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
    ) -> None:
        self._store = store
        self._prefix = prefix
        self._entry = entry
        self._state = initial
        self._fold = fold
        self._refusal = refusal
        self._holds = holds
        self._sleep = sleep
        self._entries: list[Entry[R]] = []
        self._last_digest = ""
        self._read_once = False
        self._lock = threading.RLock()

    @property
    def state(self) -> S:
        """The state as of the last ``refresh`` or ``append``; reads nothing."""
        return self._state

    @property
    def next_seq(self) -> int:
        """The position after the last entry read."""
        return len(self._entries)

    def entries(self) -> tuple[Entry[R], ...]:
        """All entries read so far, oldest first."""
        with self._lock:
            return tuple(self._entries)

    def refresh(self) -> S:
        """Read what was appended since, and return the state.

        Raises:
            Corrupt: An entry is missing, unreadable, or not the successor of the one before. Nobody may go on
                from such a log.
            AccessDenied, Unavailable
        """
        with self._lock:
            for body in self._bodies(range(self.next_seq, self._end())):
                self._take(body)
            self._read_once = True
            return self._state

    def append(self, record: R) -> S:
        """Append a record, unless the log already holds it, and return the state after it.

        Raises:
            Fenced: The log does not admit the record (any more).
            Unavailable: The store does not answer. The record may have been written: append it again later.
            Corrupt: See ``refresh``.
            AccessDenied
        """
        with self._lock:
            if not self._read_once:
                self.refresh()
            nonce = secrets.token_hex(16)
            while not self._already_holds(record):
                entry = Entry(seq=self.next_seq, nonce=nonce, prev=self._last_digest, record=record)
                if self._create(entry) or self._take(self._body(entry.seq)).nonce == nonce:
                    break
            return self._state

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
            if self._holds(self._state, record):
                return True
            refused = self._refusal(self._state, record)
            if refused is None:
                return False
        raise Fenced(f"{self._prefix}: {getattr(record, 'kind', 'the record')} is refused: {refused}")

    def _create(self, entry: Entry[R]) -> bool:
        """Write an entry at its position; False if the position is taken, by whomever."""
        key, body = layout.log_entry(self._prefix, entry.seq), entry.to_json()
        for pause_s in (*PAUSES_S, None):
            try:
                if not self._store.create(key, body):
                    return False
                self._accept(entry, body)
                return True
            except Unavailable as error:
                if self._exists(key):
                    return False
                if pause_s is None:
                    raise Unavailable(f"{error} (tried {len(PAUSES_S) + 1} times)") from error
                # The same bytes again: should the lost request arrive late, it writes the same entry.
                self._sleep(pause_s)
        raise AssertionError("unreachable")

    def _exists(self, key: str) -> bool:
        try:
            return self._store.head(key) is not None
        except Unavailable:
            return False

    def _end(self) -> int:
        """The position after the last entry that the store lists."""
        end = self.next_seq
        after = layout.log_entry(self._prefix, end - 1) if end else ""
        for info in self._store.list(self._prefix, after):
            seq = layout.parse_log_entry(self._prefix, info.key)
            if seq is None:
                continue
            if info.size_bytes > MAX_RECORD_BYTES:
                raise Corrupt(f"{self._named(info.key)}: {info.size_bytes} bytes is too large for a record")
            end = max(end, seq + 1)
        return end

    def _bodies(self, positions: range) -> Iterator[bytes]:
        """The bytes of these entries, in order."""
        if len(positions) <= _FEW:
            yield from map(self._body, positions)
            return
        # A new controller reads the whole log of every run: over a network that is waiting, not work.
        with ThreadPoolExecutor(_READERS) as pool:
            yield from pool.map(self._body, positions)

    def _body(self, seq: int) -> bytes:
        key = layout.log_entry(self._prefix, seq)
        try:
            return self._store.get(key)
        except NotFound as error:
            raise Corrupt(f"{self._named(key)}: the entry is missing, though later ones exist") from error

    def _take(self, body: bytes) -> Entry[R]:
        """Fold the entry at the next position."""
        key = layout.log_entry(self._prefix, self.next_seq)
        try:
            entry = self._parsed(body)
        except (ValidationError, ValueError) as error:
            raise Corrupt(
                f"{self._named(key)}: not a record that this version understands: {_first_line(error)}"
            ) from error
        if entry.seq != self.next_seq:
            raise Corrupt(f"{self._named(key)}: says it is entry {entry.seq}")
        if entry.prev != self._last_digest:
            raise Corrupt(f"{self._named(key)}: does not follow from the entry before, which was replaced")
        self._accept(entry, body)
        return entry

    def _parsed(self, body: bytes) -> Entry[R]:
        if len(body) > MAX_RECORD_BYTES:
            raise ValueError(f"record is {len(body)} bytes, more than {MAX_RECORD_BYTES}")
        return self._entry.validate_json(body)

    def _accept(self, entry: Entry[R], body: bytes) -> None:
        self._state = self._fold(self._state, entry)
        self._entries.append(entry)
        self._last_digest = hashlib.sha256(body).hexdigest()

    def _named(self, key: str) -> str:
        return f"{key} in {self._store.url}"


RunLog = Log[RunState, Record]


def run_log(store: ObjectStore, run_id: str, *, sleep: Callable[[float], None] = time.sleep) -> RunLog:
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
    )


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    return str(error)
