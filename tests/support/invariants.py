"""What must hold of a run in a store, judged from its objects alone and from what its writers were told.

    found = violations(store, run_id, testimony)        # sentences; [] if all holds

The log's entries are contiguous, chained and each written by whoever owned the run at that position; every
checkpoint that somebody could still resume from is there, byte for byte; what a writer was told is what the
log says. Who owned what is worked out here once more, without ``run_state``, which is under test.
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from pydantic import ValidationError

from storage import layout
from storage.errors import Fenced, NotFound
from storage.ledger import Ledger
from storage.object_store import ObjectStore
from storage.records import (
    RUN_ENTRY,
    CheckpointRef,
    Claimed,
    Committed,
    Ended,
    Finished,
    Pinned,
    Quarantined,
    Reaped,
    Record,
    Retired,
    RunEntry,
    Started,
    Unpinned,
)
from storage.run_state import RunState, fold

Fact = tuple[object, ...]

_MAY_FOLLOW_THE_END = (Retired, Reaped, Pinned, Unpinned)
_MAY_RECUR = {"pinned", "unpinned"}
_ONCE_REFUSED_NEVER_THERE = {"claimed", "started", "committed"}
_READERS = 8
_MANY = 64


@dataclass(slots=True)
class Told:
    """What the writers of one run sent, and what they were told about it."""

    sent: list[Record] = field(default_factory=list)
    acknowledged: list[Record] = field(default_factory=list)
    refused: list[Record] = field(default_factory=list)

    def add(self, other: "Told") -> None:
        self.sent += other.sent
        self.acknowledged += other.acknowledged
        self.refused += other.refused


class Witnessed:
    """A ledger that takes down what its user sends and is told. An append that raises is told nothing."""

    def __init__(self, ledger: Ledger, testimony: Told) -> None:
        self._ledger = ledger
        self._testimony = testimony

    def refresh(self) -> RunState:
        return self._ledger.refresh()

    def append(self, record: Record) -> RunState:
        self._testimony.sent.append(record)
        try:
            state = self._ledger.append(record)
        except Fenced:
            self._testimony.refused.append(record)
            raise
        self._testimony.acknowledged.append(record)
        return state


def violations(
    store: ObjectStore,
    run_id: str,
    told: Told | None = None,
    *,
    damaged: Collection[str] = (),
) -> list[str]:
    """Return a sentence for each thing that must hold and does not.

    Args:
        told: What all writers of the log were told; None: nothing is known of them.
        damaged: Keys that the test itself spoilt.
    """
    found: list[str] = []
    entries = _chain(store, run_id, found)
    states = _states(entries)
    found += _fencing(entries)
    found += _deletions(entries, states)
    found += _resumes(entries, states)
    if told is not None:
        found += _hearsay(entries, told)
    found += _data(store, run_id, states[-1], damaged)
    found += _quarantines(run_id, entries, states[-1], damaged)
    return found


def leftovers(store: ObjectStore, run_id: str, state: RunState) -> list[str]:
    """Keys of checkpoint data that no restorable, salvaged, retired or quarantined checkpoint names."""
    known = {c.ref for c in (*state.stored, *state.retired)}
    if not state.finished:
        known |= {ref for ref, _ in state.quarantined}
    keys = [info.key for info in store.list(layout.data_prefix(run_id))]
    return [key for key in keys if (data := layout.parse_data(key)) is None or data.ref not in known]


def _chain(store: ObjectStore, run_id: str, found: list[str]) -> list[RunEntry]:
    """The log's entries up to the first that is missing, foreign, or does not follow from the one before."""
    prefix = layout.run_log_prefix(run_id)
    keys = [info.key for info in store.list(prefix)]
    positions = [layout.parse_log_entry(prefix, key) for key in keys]
    if positions != list(range(len(keys))):
        found.append(f"{run_id}: the log's positions are {positions}, not 0 to {len(keys) - 1}")
        return []
    entries: list[RunEntry] = []
    before = ""
    for key, body in zip(keys, _bodies(store, keys), strict=True):
        try:
            entry = RUN_ENTRY.validate_json(body)
        except ValidationError as error:
            found.append(f"{key}: not an entry: {error}")
            break
        if entry.seq != len(entries):
            found.append(f"{key}: says it is entry {entry.seq}")
            break
        if entry.prev != before:
            found.append(f"{key}: does not follow from the entry before it")
            break
        entries.append(entry)
        before = hashlib.sha256(body).hexdigest()
    return entries


def _bodies(store: ObjectStore, keys: list[str]) -> Iterable[bytes]:
    if len(keys) < _MANY:
        return [store.get(key) for key in keys]
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(store.get, keys))


def _states(entries: list[RunEntry]) -> list[RunState]:
    """The state before the first entry, and after each."""
    states = [RunState()]
    for entry in entries:
        states.append(fold(states[-1], entry))
    return states


def _fencing(entries: list[RunEntry]) -> list[str]:
    """Every record is by the attempt that owned the run at its position."""
    found: list[str] = []
    owner: Claimed | None = None
    over: Ended | Finished | None = None
    for entry in entries:
        record, at = entry.record, f"entry {entry.seq}"
        if isinstance(over, Finished) and not isinstance(record, _MAY_FOLLOW_THE_END):
            found.append(f"{at}: {record.kind} after the run was over")
        match record:
            case Claimed(attempt=attempt):
                if owner and over is None:
                    found.append(f"{at}: attempt {attempt} is claimed while attempt {owner.attempt} runs")
                if attempt != (owner.attempt if owner else 0) + 1:
                    found.append(f"{at}: attempt {attempt} is claimed out of turn")
                owner, over = record, None
            case Started() | Committed() | Ended() | Quarantined(attempt=int()):
                if owner is None or record.attempt != owner.attempt:
                    last = owner.attempt if owner else 0
                    found.append(
                        f"{at}: {record.kind} by attempt {record.attempt}, the last claimed is {last}"
                    )
                elif isinstance(over, Ended):
                    found.append(f"{at}: {record.kind} by attempt {record.attempt}, which has ended")
                elif isinstance(record, Committed) and record.incarnation != owner.incarnation:
                    found.append(f"{at}: committed by {record.incarnation}, claimed by {owner.incarnation}")
                if isinstance(record, Ended):
                    over = record
            case Finished():
                over = record
    return found


def _deletions(entries: list[RunEntry], states: list[RunState]) -> list[str]:
    """Nothing was given up that is the newest, the result, pinned, or not retired before."""
    found: list[str] = []
    retired: set[CheckpointRef] = set()
    results = {e.record.ref for e in entries if isinstance(e.record, Committed) and e.record.final}
    for entry, before in zip(entries, states, strict=False):
        record, at = entry.record, f"entry {entry.seq}"
        match record:
            case Retired(checkpoints=refs):
                retired |= set(refs)
                for ref in refs:
                    if before.newest and before.newest.ref == ref:
                        found.append(f"{at}: retires {ref}, the newest checkpoint")
                    if ref in results:
                        found.append(f"{at}: retires {ref}, a final checkpoint")
                    if ref in before.pinned:
                        found.append(f"{at}: retires {ref}, which is pinned")
            case Reaped(checkpoints=refs):
                found += [f"{at}: reaps {ref}, which was not retired" for ref in refs if ref not in retired]
    return found


def _resumes(entries: list[RunEntry], states: list[RunState]) -> list[str]:
    """Each attempt that started had resumed from what was the newest checkpoint since it was claimed."""
    found: list[str] = []
    newest: set[int] = set()
    for entry, before in zip(entries, states, strict=False):
        match entry.record:
            case Claimed():
                newest = {before.committed_step}
            case Started(step=step, attempt=attempt) if step not in newest | {before.committed_step}:
                found.append(f"entry {entry.seq}: attempt {attempt} resumed from {step}, not from {newest}")
        newest.add(before.committed_step)
    return found


def _hearsay(entries: list[RunEntry], told: Told) -> list[str]:
    """What was acknowledged is in the log, once; what is there was sent; what was refused is not there."""
    found: list[str] = []
    written = Counter(fact for entry in entries for fact in _facts(entry.record))
    sent = {record.model_dump_json() for record in told.sent}
    for entry in entries:
        if entry.record.model_dump_json() not in sent:
            found.append(f"entry {entry.seq}: nobody sent this {entry.record.kind}")
    for fact, times in written.items():
        if times > 1 and fact[0] not in _MAY_RECUR:
            found.append(f"{times} times in the log: {fact}")
    for record in told.acknowledged:
        found += [f"acknowledged, and not in the log: {f}" for f in _facts(record) if f not in written]
    for record in told.refused:
        if record.kind in _ONCE_REFUSED_NEVER_THERE:
            found += [f"refused, and in the log: {f}" for f in _facts(record) if f in written]
    return found


def _facts(record: Record) -> list[Fact]:
    """What a record states. Two records that state the same are one fact, whenever they were written."""
    match record:
        case Claimed(attempt=attempt, incarnation=incarnation):
            return [("claimed", attempt, incarnation)]
        case Committed(attempt=attempt, incarnation=incarnation, step=step, final=final, files=files):
            return [("committed", attempt, incarnation, step, final, record.resumable, files)]
        case Started(attempt=attempt) | Ended(attempt=attempt):
            return [(record.kind, attempt)]
        case Retired(checkpoints=refs) | Reaped(checkpoints=refs):
            return [(record.kind, ref) for ref in refs]
        case Quarantined(checkpoint=ref, attempt=by):
            return [("quarantined", ref, by)]
        case Pinned(checkpoint=ref) | Unpinned(checkpoint=ref):
            return [(record.kind, ref)]
        case Finished(outcome=outcome):
            return [("finished", outcome)]
        case _:
            return [(record.kind,)]


def _data(store: ObjectStore, run_id: str, state: RunState, damaged: Collection[str]) -> list[str]:
    """Every file that a resume or an export would read is there with the right bytes."""
    judged = [*state.stored]
    if len(judged) < _MANY:
        return [line for c in judged for line in _files(store, run_id, damaged, c)]
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(partial(_files, store, run_id, damaged), judged)
        return [line for lines in found for line in lines]


def _files(store: ObjectStore, run_id: str, damaged: Collection[str], checkpoint: Committed) -> list[str]:
    found = []
    for file in checkpoint.files:
        key, promised = layout.committed_file(run_id, checkpoint, file.name), file.packed or file
        if key in damaged:
            continue
        try:
            body = store.get(key)
        except NotFound:
            found.append(f"{key}: committed, not retired, and not there")
            continue
        if (len(body), hashlib.sha256(body).hexdigest()) != (promised.size_bytes, promised.sha256):
            found.append(f"{key}: not the bytes that were committed")
    return found


def _quarantines(
    run_id: str, entries: list[RunEntry], state: RunState, damaged: Collection[str]
) -> list[str]:
    """No checkpoint was found unusable that nobody spoilt."""
    spoilt = {data.ref for key in damaged if (data := layout.parse_data(key)) and data.run == run_id}
    return [
        f"entry {entry.seq}: {entry.record.checkpoint} is quarantined, though nobody spoilt it"
        for entry in entries
        if isinstance(entry.record, Quarantined) and entry.record.checkpoint not in spoilt
    ]
