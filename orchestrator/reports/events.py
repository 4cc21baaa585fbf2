"""Everything that the logs of a sweep, or of one run, tell, as one sequence in time.

Of a sweep these are the logs of its runs and that of its drains.

Times are those of whoever wrote a record, and clocks differ. Within one log its order stands: an entry that
claims to be older than the one before it is shown at that one's time. Between logs only the times can tell.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from storage.drains import DrainEntry, DrainRecord
from storage.errors import Corrupt, Unavailable
from storage.log import RunLog, run_log
from storage.object_store import ObjectStore
from storage.records import Record, RunEntry

from ..control.draining import DrainLog, drain_log
from .why import date_and_time, shown_line, told

AnyEntry = RunEntry | DrainEntry

THREADS = 16
LOOKS_AT_ONCE = 64
"""Logs that one more look reads: each is a listing, which costs as much as a write."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Happening:
    """One entry of a log."""

    log: str
    """The run that it is about, or the sweep."""
    seq: int
    moment: float
    """Its own time, or that of the entry before it, if that is later."""
    record: Record | DrainRecord


def in_order(logs: Mapping[str, Sequence[AnyEntry]]) -> list[Happening]:
    """Return the entries of several logs, oldest first."""
    found = []
    for name, entries in logs.items():
        moment = float("-inf")
        for entry in entries:
            moment = max(moment, entry.record.at)
            found.append(Happening(log=name, seq=entry.seq, moment=moment, record=entry.record))
    # The sort is stable: entries of one log never change places.
    return sorted(found, key=lambda happening: happening.moment)


def line(happening: Happening, at: Callable[[float], str] | None = None) -> str:
    """Return a happening for a person."""
    clock = at or date_and_time
    return shown_line(f"{clock(happening.moment)}  {happening.log}  {in_words(happening.record)}")


def as_json(happening: Happening) -> str:
    """Return a happening as one line of JSON: the record, whose it is, and what it says in words."""
    data: dict[str, Any] = {
        "schema": 1,
        "log": happening.log,
        "seq": happening.seq,
        **happening.record.model_dump(mode="json", exclude={"files"}),
        "text": shown_line(in_words(happening.record)),
    }
    return shown_line(json.dumps(data))


def in_words(record: Record | DrainRecord) -> str:
    """Return what a record says; ``shown_line`` makes it safe to print."""
    match record.kind:
        case "drain_asked":
            return f"node {record.node} is to be left alone: attempts there get {record.grace_s:g} s to end"
        case "drain_lifted":
            return f"node {record.node} may be used again"
        case _:
            return told(record)


class EventReader:
    """Reads logs again and again, each time only what is new."""

    def __init__(self, store: ObjectStore, run_ids: Iterable[str], sweep: str | None = None) -> None:
        """``sweep``: tell what it was told about nodes, too."""
        self._logs: dict[str, RunLog] = {run_id: run_log(store, run_id, readers=2) for run_id in run_ids}
        self._drains: dict[str, DrainLog] = {sweep: drain_log(store, sweep)} if sweep else {}
        self._told = dict.fromkeys((*self._logs, *self._drains), 0)
        """How many entries of each log were returned."""
        self._turn: list[str] = []
        self.damaged: dict[str, str] = {}
        """Logs that cannot be read to their end, and why."""

    @property
    def over(self) -> bool:
        """Every run is over, so that nothing of interest will follow."""
        return all(log.state.finished or run_id in self.damaged for run_id, log in self._logs.items())

    def read(self) -> list[Happening]:
        """Return what all logs say that was not returned before.

        Raises:
            AccessDenied, Unavailable
        """
        with ThreadPoolExecutor(THREADS) as pool:
            return in_order(dict(zip(self._told, pool.map(self._news, self._told), strict=True)))

    def look(self) -> list[Happening]:
        """Return what is new in the logs that were not looked at for longest. One that cannot be read now
        is read later.

        Raises:
            AccessDenied
        """
        if not self._turn:
            self._turn = [name for name, log in self._logs.items() if log.state.finished is None]
            self._turn += self._drains
        now, self._turn = self._turn[:LOOKS_AT_ONCE], self._turn[LOOKS_AT_ONCE:]
        with ThreadPoolExecutor(THREADS) as pool:
            return in_order(dict(zip(now, pool.map(self._news_if_there, now), strict=True)))

    def _news_if_there(self, name: str) -> Sequence[AnyEntry]:
        try:
            return self._news(name)
        except Unavailable:
            return ()

    def _news(self, name: str) -> Sequence[AnyEntry]:
        log: RunLog | DrainLog = self._drains[name] if name in self._drains else self._logs[name]
        try:
            log.refresh()
        except Corrupt as error:
            self.damaged[name] = str(error)
        entries = log.entries()
        news, self._told[name] = entries[self._told[name] :], len(entries)
        return news
