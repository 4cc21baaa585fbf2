"""Actors in one thread on one store that delays, repeats and loses what they send: all chosen by one seed.

    interleaving = Interleaving(random.Random(seed), MemoryStore(), faults=0.1)
    interleaving.spawn("trainer", lambda store: …)
    interleaving.run()

Each actor runs real code until its next call to the store; there it waits, and who goes on next is drawn. So
between any two calls of one actor anything may happen: others act, a request that was given up for lost
arrives, the actor dies, or it stalls until everybody else is done and wakes as a ghost. There is no clock and
no thread: one seed is one history.
"""

import random
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from greenlet import greenlet
from support.flaky_store import Died

from storage.errors import Unavailable
from storage.object_store import ObjectInfo, ObjectStore

T = TypeVar("T")

STALL = 0.03
DEATH = 0.008
LATE_ARRIVES = 0.15
MOST_CALLS = 5_000
"""A schedule that needs more does not end."""


@dataclass(slots=True, eq=False)
class Actor:
    """Somebody who talks to the store."""

    name: str
    turns: greenlet
    asleep: int = 0
    """Turns of others that it sleeps through."""
    dead: bool = False
    mortal: bool = True


class Interleaving:
    """Runs actors one call at a time, in an order and with faults drawn from ``chance``.

    Args:
        faults: How likely a call goes wrong in one way or another.
        torn_create: ``create`` looks and then writes, and others may come between: a server that lies.
        record: Keep a line for each thing that happens in ``history``.
    """

    def __init__(
        self,
        chance: random.Random,
        inner: ObjectStore,
        *,
        faults: float,
        deaths: float = DEATH,
        torn_create: bool = False,
        record: bool = False,
        most_calls: int = MOST_CALLS,
    ) -> None:
        self.inner = inner
        self.chance = chance
        self.faults = faults
        self.deaths = deaths
        self.torn_create = torn_create
        self.record = record
        self.most_calls = most_calls
        self.history: list[str] = []
        self.turn = 0
        self.problems: list[str] = []
        self._actors: list[Actor] = []
        self._late: list[tuple[str, Callable[[], object]]] = []
        self.arrived_late = set[str]()
        """The calls that took effect when their caller had long been told that they failed."""
        self._hub = greenlet.getcurrent()
        self._thread = threading.get_ident()

    def spawn(self, name: str, work: Callable[["Seat"], None], *, mortal: bool = True) -> None:
        """Add an actor. An exception that leaves ``work`` is a problem, but for death."""
        actor = Actor(name, greenlet(lambda: self._live(actor, work), self._hub), mortal=mortal)
        self._actors.append(actor)

    def run(self) -> None:
        """Let everybody come to an end, then let what is still under way arrive."""
        while self._actors:
            self.turn += 1
            if self.turn > self.most_calls:
                self.problems.append("the schedule does not end")
                self._kill_all()
                return
            if self._late and self.chance.random() < LATE_ARRIVES:
                self._arrive()
            actor = self._next()
            if actor.mortal and self.chance.random() < self.deaths:
                self._kill(actor)
            else:
                actor.turns.switch()
            if actor.dead or actor.turns.dead:
                self._actors.remove(actor)
            elif self.chance.random() < STALL:
                actor.asleep = self.turn + self.chance.choice((5, 20, 80, 1000))
        while self._late:
            self._arrive()

    def pause(self, seconds: float = 0.0) -> None:
        """What a sleep is here: everybody else may go on."""
        if threading.get_ident() == self._thread:
            self._hub.switch()

    def later(self, what: str, effect: Callable[[], object]) -> None:
        """Let something arrive at some time, or when all are done."""
        self._late.append((what, effect))

    def note(self, line: str) -> None:
        if self.record:
            self.history.append(line)

    def _live(self, actor: Actor, work: Callable[["Seat"], None]) -> None:
        try:
            work(Seat(self, actor))
        except Died:
            self.note(f"{actor.name} dies")
        except Exception as error:
            self.note(f"{actor.name} raises {type(error).__name__}: {error}")
            self.problems.append(f"{actor.name}: {type(error).__name__}: {error}")

    def _next(self) -> Actor:
        awake = [actor for actor in self._actors if actor.asleep <= self.turn]
        if not awake:
            return min(self._actors, key=lambda actor: actor.asleep)
        return awake[int(self.chance.random() * len(awake))]

    def _kill(self, actor: Actor) -> None:
        actor.dead = True
        if actor.turns:  # it has begun
            actor.turns.throw(Died)

    def _kill_all(self) -> None:
        for actor in self._actors:
            self._kill(actor)
        self._actors.clear()

    def _arrive(self) -> None:
        what, effect = self._late.pop(int(self.chance.random() * len(self._late)))
        self.note(f"  arrives late: {what}")
        self.arrived_late.add(what)
        effect()

    def call(self, actor: Actor, what: str, effect: Callable[[], T], *, writes: bool = False) -> T:
        """Carry out a call of an actor, or what becomes of it."""
        if threading.get_ident() != self._thread:
            return effect()  # a reader's helper thread, while its actor waits: nobody comes between
        if actor.dead:
            raise Died
        self._hub.switch()
        if self.chance.random() >= self.faults:
            result = effect()
            if self.record:
                self.note(f"{actor.name}: {what} -> {_shown(result)}")
            return result
        return self._faulty(actor, what, effect, writes=writes)

    def _faulty(self, actor: Actor, what: str, effect: Callable[[], T], *, writes: bool) -> T:
        fault = self.chance.choice(("lost", "answered late", "late", "twice", "echoed")) if writes else "lost"
        self.note(f"{actor.name}: {what} -> {fault}")
        match fault:
            case "twice":
                self._late.append((what, effect))
                return effect()
            case "echoed":  # the network sent it twice, and the second answer is the one that came through
                effect()
                return effect()
            case "answered late":
                effect()
            case "late":
                self._late.append((what, effect))
        raise Unavailable(f"{what}: no answer")


class Seat:
    """The store as one actor sees it."""

    def __init__(self, interleaving: Interleaving, actor: Actor) -> None:
        self._at = interleaving
        self._actor = actor
        self._inner = interleaving.inner

    @property
    def url(self) -> str:
        return self._inner.url

    @property
    def name(self) -> str:
        return self._actor.name

    def put(self, key: str, body: bytes | Path) -> None:
        content = body.read_bytes() if isinstance(body, Path) else body
        self._call(f"put {key}", lambda: self._inner.put(key, content), writes=True)

    def create(self, key: str, body: bytes) -> bool:
        def torn() -> bool:
            if self._inner.head(key) is not None:
                return False
            self._at.pause()
            self._inner.put(key, body)
            return True

        whole = not self._at.torn_create
        return self._call(
            f"create {key}", (lambda: self._inner.create(key, body)) if whole else torn, writes=whole
        )

    def get(self, key: str) -> bytes:
        return self._call(f"get {key}", lambda: self._inner.get(key))

    def download(self, key: str, target: Path) -> None:
        self._call(f"download {key}", lambda: self._inner.download(key, target))

    def head(self, key: str) -> ObjectInfo | None:
        return self._call(f"head {key}", lambda: self._inner.head(key))

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        return iter(self._call(f"list {prefix}", lambda: tuple(self._inner.list(prefix, after))))

    def delete(self, keys: Iterable[str]) -> None:
        for key in tuple(keys):  # one request each: a death or a cut may come between
            self._call(f"delete {key}", lambda key=key: self._inner.delete([key]), writes=True)  # type: ignore[misc]

    def abort_uploads(self, prefix: str) -> int:
        return self._call(f"abort {prefix}", lambda: self._inner.abort_uploads(prefix))

    def unfinished(self, prefix: str) -> Iterator[ObjectInfo]:
        return iter(self._call(f"uploads {prefix}", lambda: tuple(self._inner.unfinished(prefix))))

    def _call(self, what: str, effect: Callable[[], T], *, writes: bool = False) -> T:
        return self._at.call(self._actor, what, effect, writes=writes)


def _shown(result: object) -> str:
    if isinstance(result, bytes):
        return result[:160].decode(errors="replace")
    if isinstance(result, tuple):
        return f"{len(result)} objects"
    return str(result)
