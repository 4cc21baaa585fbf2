"""The world of a simulated sweep: what goes wrong how often, its time, and who lives in it."""

import random
from dataclasses import dataclass, field

from support.fake_cluster import FakeCluster
from support.unreliable_store import Interleaving

from orchestrator.grid.sweep import Sweep

BEGAN_AT = 1000.0
HORIZON_S = 45
"""So long anything may go wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather:
    """How likely what goes wrong, in one history."""

    store: float = 0.0
    """Of a call."""
    cluster: float = 0.0
    """Of a second."""
    messages: float = 0.0
    """Of a report or an order."""
    deaths: float = 0.0
    """Of a controller, at each of its calls."""
    hangs: float = 0.0
    """Of what a reader does."""
    second: float = 0.0
    cancels: float = 0.0
    drains: float = 0.0
    """Of an operator's, in each tick; where the store fails there are none."""
    pace: float = 0.1
    """Of a second passing while a controller waits for one call."""

    @property
    def most_attempts(self) -> int | None:
        """What a run may need if nothing happens that should end an attempt.

        Controllers may die as they like. One that takes over on another cluster begins each run once more,
        and so may its predecessor, once, before it learns of that.
        """
        harmful = self.store or self.cluster or self.messages or self.hangs or self.cancels or self.drains
        if self.second:
            return None if harmful or self.deaths else 3
        return None if harmful else 1


def weather(chance: random.Random) -> Weather:
    if chance.random() < 0.15:
        return Weather(
            deaths=chance.choice((0.0, 0.01, 0.05)), second=chance.choice((0.0, 0.0, 1.0)), pace=0.02
        )
    store = chance.choice((0.0, 0.0, 0.03, 0.1, 0.25))
    return Weather(
        store=store,
        drains=chance.choice((0.0, 0.0, 0.0, 0.0 if store else 0.03)),
        cluster=chance.choice((0.0, 0.05, 0.2, 0.4)),
        messages=chance.choice((0.0, 0.05, 0.3)),
        deaths=chance.choice((0.0, 0.005, 0.02)),
        hangs=chance.choice((0.0, 0.0, 0.1)),
        second=0.35,
        cancels=chance.choice((0.0, 0.3)),
        pace=chance.choice((0.02, 0.1, 0.3)),
    )


@dataclass(slots=True)
class World:
    """A sweep, its store, and who works on it."""

    interleaving: Interleaving
    chance: random.Random
    weather: Weather
    sweep: Sweep
    clusters: list[FakeCluster] = field(default_factory=list)
    controllers: int = 0
    idle: int = 0
    """So many controllers wait for the next second."""
    alive: int = 0

    @property
    def now(self) -> float:
        return self.clusters[0].now if self.clusters else BEGAN_AT

    @property
    def over(self) -> bool:
        return self.now >= BEGAN_AT + HORIZON_S

    def clock(self) -> float:
        return self.now

    def odds(self, likely: float) -> bool:
        return likely > 0 and self.chance.random() < likely

    def advance(self) -> None:
        for cluster in self.clusters:
            cluster.advance()

    def note(self, line: str) -> None:
        self.interleaving.note(f"{self.now - BEGAN_AT:4.0f} s  {line}")
