"""Carries out what ``rules`` planned. A process may die between any two calls, and two may work at once.

Data first, then the record that says it is gone; for what is still readable the other way round. Whoever
comes second finds a record refused, or nothing to delete, and takes that for done.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol, runtime_checkable

from .. import layout
from ..content import store as content
from ..content.state import Retired as ContentRetired
from ..content.state import Unreferenced, reapable, unreferenced
from ..errors import (
    AccessDenied,
    Corrupt,
    Fenced,
    StorageError,
)
from ..ledger import Ledger
from ..log import RunLog, RunSnapshot, run_log
from ..object_store import ObjectInfo, ObjectStore
from ..records import Reaped, Retired
from .inventory import (
    ContentObjects,
    Inventory,
    size_of,
    sweeps_in,
    written_s,
)
from .rules import (
    ABANDONED_S,
    GRACE_S,
    Doomed,
    RunPlan,
    old_enough,
)

READERS = 8
_TRIES = 3
_DELETED_AT_ONCE = 20


@runtime_checkable
class TellsTime(Protocol):
    """A store behind a server with a clock of its own."""

    def server_time(self) -> datetime | None:
        """What that clock says; None if the server does not tell."""


@dataclass(slots=True)
class Collected:
    """What became of a plan, or of a part of it."""

    retired: int = 0
    objects: int = 0
    size_bytes: int = 0
    denied: str = ""
    """The store refused: what could not be deleted stays, and costs nothing but space."""
    failed: str = ""
    """The store did not answer: the next gc goes on from here."""
    damaged: str = ""
    """A log that cannot be read: nothing of its run was touched."""

    def add(self, other: "Collected") -> None:
        self.retired += other.retired
        self.objects += other.objects
        self.size_bytes += other.size_bytes
        self.denied = self.denied or other.denied
        self.failed = self.failed or other.failed
        self.damaged = self.damaged or other.damaged


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentPlan:
    """What goes of one content."""

    digest: str
    retire: tuple[Unreferenced, ...] = ()
    reap: tuple[str, ...] = ()
    """Incarnations that were retired long enough ago, and late uploads of those reaped before."""
    retire_bytes: int = 0
    reap_bytes: int = 0
    reap_objects: int = 0

    @property
    def work(self) -> bool:
        return bool(self.retire or self.reap)


def store_time(store: ObjectStore, inventory: Inventory) -> float | None:
    """Return Unix seconds by the clock that stamps what the store holds, or a moment that it has passed.

    A folder's clock is this machine's: the file system of another one may go wrong by their difference.
    """
    if isinstance(store, TellsTime):
        told = store.server_time()
        return told.timestamp() if told else inventory.newest_s
    return time.time() if store.url.startswith("file:") else inventory.newest_s


def read_logs(
    store: ObjectStore,
    run_ids: Iterable[str],
    snapshots: Mapping[str, RunSnapshot] | None = None,
    *,
    on_read: Callable[[], None] = lambda: None,
) -> dict[str, RunLog | Corrupt]:
    """Read the log of each run, several at once; one that is damaged is what is wrong with it.

    Args:
        snapshots: What logs said before: of these only the rest is read. Good enough for a plan, and to be
            confirmed before anything is deleted.
    """
    known = snapshots or {}

    def read(run_id: str) -> RunLog | Corrupt:
        log = run_log(store, run_id, hint=lambda: known.get(run_id))
        try:
            log.refresh()
        except Corrupt as error:
            return error
        finally:
            on_read()
        return log

    names = sorted(run_ids)
    with ThreadPoolExecutor(READERS) as pool:
        return dict(zip(names, pool.map(read, names), strict=True))


def collect_run(
    store: ObjectStore,
    plan: RunPlan,
    ledger: Ledger | None,
    *,
    clock: Callable[[], float] = time.time,
) -> Iterator[Collected]:
    """Do what is planned for a run, step by step; one that the store refuses is passed over.

    Args:
        ledger: Where to append; None: this process may not, so only what needs no record goes.
    """
    if plan.orphans:
        yield _delete(store, [(o.key, o.size_bytes) for o in plan.orphans])
    for prefix in plan.uploads:
        yield _attempted(lambda prefix=prefix: _abort(store, prefix))  # type: ignore[misc]
    if plan.reap:
        yield _attempted(lambda: _reap(store, plan.reap, ledger, clock))
    if plan.retire and ledger and plan.keep:
        yield _attempted(lambda: _retire(plan, ledger, clock))


def collect_loose(store: ObjectStore, infos: Iterable[ObjectInfo]) -> Collected:
    """Delete what belongs to no run."""
    return _delete(store, [(info.key, info.size_bytes) for info in infos])


def collect_uploads(store: ObjectStore, uploads: Iterable[ObjectInfo]) -> Iterator[Collected]:
    """End unfinished uploads that belong to no run."""
    planned = {(info.key, info.modified_s) for info in uploads}
    for key in sorted({key for key, _ in planned}):
        yield _attempted(lambda key=key: _abort_planned(store, key, planned))  # type: ignore[misc]


def plan_contents(
    store: ObjectStore, contents: Mapping[str, ContentObjects], now_s: float | None
) -> list[ContentPlan]:
    """Return what goes of each content, in digest order. A damaged log's content is left alone."""
    logs: dict[str, content.ContentLog] = {}
    for digest in sorted(contents):
        log = content.content_log(store, digest)
        try:
            log.refresh()
        except Corrupt:
            continue
        logs[digest] = log
    existing = sweeps_in(store)  # after the logs: a submission records its use first and its sweep last
    plans = (_plan_content(d, contents[d], log, existing, now_s) for d, log in logs.items())
    return [plan for plan in plans if plan.work]


def collect_content(store: ObjectStore, plan: ContentPlan) -> Iterator[Collected]:
    """Do what is planned for a content."""
    log = content.content_log(store, plan.digest)

    def reap() -> Collected:
        count = content.reap(store, plan.digest, log, sweeps_in(store), only=plan.reap)
        return Collected(objects=count, size_bytes=plan.reap_bytes)

    if plan.reap:
        yield _attempted(reap)
    for what in plan.retire:
        yield _attempted(lambda what=what: Collected(retired=content.retire(log, what)))  # type: ignore[misc]


def _plan_content(
    digest: str,
    objects: ContentObjects,
    log: content.ContentLog,
    existing: frozenset[str],
    now_s: float | None,
) -> ContentPlan:
    state, ages = log.state, {s: written_s(objects.log, s) for s in objects.log}
    newest = max((at for at in ages.values() if at is not None), default=None)
    retired = {e.record.incarnation: e.seq for e in log.entries() if isinstance(e.record, ContentRetired)}
    retire = [
        what
        for what in unreferenced(state, existing, objects.data)
        if (
            old_enough(newest, GRACE_S, now_s)
            if what.stored
            else old_enough(_last_written(objects, what.incarnation), ABANDONED_S, now_s)
        )
    ]
    ripe = [
        upload.incarnation
        for upload in reapable(state, existing)
        if old_enough(ages.get(retired.get(upload.incarnation, -1)), GRACE_S, now_s)
    ]
    late = sorted(state.reaped & objects.data.keys())
    reap = tuple(dict.fromkeys((*ripe, *late)))
    gone = [info for name in reap for info in objects.data.get(name, ())]
    return ContentPlan(
        digest=digest,
        retire=tuple(retire),
        reap=reap,
        retire_bytes=sum(size_of(objects.data.get(what.incarnation, ())) for what in retire),
        reap_bytes=size_of(gone),
        reap_objects=len(gone),
    )


def _last_written(objects: ContentObjects, incarnation: str) -> float | None:
    """When the last file of an upload arrived, by the store's clock; None if it does not tell."""
    times = [info.modified_s for info in objects.data.get(incarnation, ())]
    return max((t for t in times if t is not None), default=None)


def _attempted(step: Callable[[], Collected]) -> Collected:
    try:
        return step()
    except AccessDenied as error:
        return Collected(denied=str(error))
    except StorageError as error:
        return Collected(failed=str(error))


def _delete(store: ObjectStore, sized: list[tuple[str, int]]) -> Collected:
    """Delete objects, and those that the store refuses to delete are passed over."""
    done = Collected()
    for start in range(0, len(sized), _DELETED_AT_ONCE):
        part = sized[start : start + _DELETED_AT_ONCE]
        try:
            store.delete(key for key, _ in part)
        except AccessDenied as error:  # some objects may be locked, and others not
            done.denied = done.denied or str(error)
        except StorageError as error:
            done.failed = str(error)
            return done
        else:
            done.objects += len(part)
            done.size_bytes += sum(size for _, size in part)
    return done


def _abort_planned(store: ObjectStore, key: str, planned: set[tuple[str, float | None]]) -> Collected:
    """End the uploads of a key, unless one that was not planned to end would end with them: another of the
    same key, or of a longer one."""
    if any((info.key, info.modified_s) not in planned for info in store.unfinished(key)):
        return Collected()
    return _abort(store, key)


def _abort(store: ObjectStore, prefix: str) -> Collected:
    return Collected(objects=store.abort_uploads(prefix))


def _reap(
    store: ObjectStore, doomed: tuple[Doomed, ...], ledger: Ledger | None, clock: Callable[[], float]
) -> Collected:
    done, gone = Collected(), []
    for d in doomed:
        deleted = _delete(store, list(d.sized))
        done.add(deleted)
        if deleted.failed:
            return done
        if not deleted.denied:
            gone.append(d.checkpoint.ref)
    if ledger is None:
        return done  # they stay retired; there is just nothing left of them
    refs = tuple(gone)
    for _ in range(_TRIES):
        there = {c.ref for c in ledger.refresh().retired}
        refs = tuple(ref for ref in refs if ref in there)  # another may have recorded some
        if not refs:
            return done
        try:
            ledger.append(Reaped(checkpoints=refs, at=clock()))
            return done
        except Fenced:
            continue
    return done


def _retire(plan: RunPlan, ledger: Ledger, clock: Callable[[], float]) -> Collected:
    """Retire what is still superseded now."""
    assert plan.keep is not None
    planned = {d.checkpoint.ref for d in plan.retire}
    for _ in range(_TRIES):
        state = ledger.refresh()
        refs = tuple(ref for ref in plan.keep.superseded(state) if ref in planned)
        if not refs:
            return Collected()
        try:
            ledger.append(Retired(checkpoints=refs, at=clock()))
            return Collected(retired=len(refs))
        except Fenced:
            continue  # pinned, or retired by another, since it was read
    return Collected(failed=f"{layout.run_log_prefix(plan.run)}: changes too fast; the next gc looks again")
