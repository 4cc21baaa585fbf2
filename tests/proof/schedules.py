"""Random histories of one run: controllers, trainers, ghosts and a garbage collector on a faulty store.

    python -m proof.schedules -n 100000 --seed 1      # the last line: {"schedules": 100000, "violations": 0}
    python -m proof.schedules -n 1 --seed 4711        # one schedule again, told call by call

Each seed is one history of about two dozen operations by the real ``Log`` and ``CheckpointStore``. When
everybody is done or dead, a calm successor takes the run to its end, which it must always be able to do;
then ``invariants`` judges what is in the store. A seed that fails is printed.
"""

import contextlib
import os
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TypeVar

from proof.seeds import Verdict, command
from support.invariants import Told, Witnessed, leftovers, violations
from support.runs import RUN, read_files
from support.unreliable_store import Interleaving, Seat

from storage import layout
from storage.checkpoints import CheckpointStore
from storage.errors import (
    Corrupt,
    Fenced,
    NotFound,
    StorageError,
    Unavailable,
)
from storage.garbage.collecting import collect_run
from storage.garbage.inventory import RunObjects, take
from storage.garbage.rules import Keep, plan_run
from storage.local import (
    LocalCheckpoint,
    Manifest,
    hash_files,
    read_checkpoint,
    seal,
    step_dir,
    temporary_dir,
)
from storage.log import RunLog, RunSnapshot, run_log
from storage.memory import MemoryStore
from storage.object_store import ObjectStore
from storage.records import (
    CancelRequested,
    CheckpointRef,
    Claimed,
    Ended,
    EndReason,
    Finished,
    Outcome,
    Pinned,
    Retired,
    Started,
    Unpinned,
)
from storage.retention import plan_prune
from storage.run_state import RunState

T = TypeVar("T")

LAST_STEPS = (2, 2, 3)
MOST_ATTEMPTS = 4
TRIES = 3
FAULTS = (0.0, 0.03, 0.1, 0.25)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutation:
    """A protocol that is wrong on purpose: the checks must notice."""

    torn_create: bool = False
    checkpoints: type[CheckpointStore] = CheckpointStore


@dataclass(slots=True)
class World:
    """One run, everybody who works on it, and what they were told."""

    interleaving: Interleaving
    chance: random.Random
    mutation: Mutation
    after: contextlib.ExitStack
    last_step: int
    testimony: Told = field(default_factory=Told)
    damaged: set[str] = field(default_factory=set)
    spawned: set[str] = field(default_factory=set)
    logs: list[RunLog] = field(default_factory=list)

    def ledger(self, store: ObjectStore, *, hinted: bool = True) -> Witnessed:
        # One reader: who reads when is the schedule's to choose.
        hint = self.snapshot if hinted else _no_snapshot
        log = run_log(store, RUN, sleep=self.interleaving.pause, hint=hint, readers=1)
        self.logs.append(log)
        return Witnessed(log, self.testimony)

    def snapshot(self) -> RunSnapshot | None:
        """What some log had read at this moment, or nothing, or, of a cache that is damaged, nonsense."""
        if not self.odds(0.3):
            return None
        found = self.logs[int(self.chance.random() * len(self.logs))].snapshot()
        if found and self.odds(0.1):
            return replace(found, digest="0" * 64)
        if found and self.odds(0.1):
            return replace(found, next_seq=found.next_seq + 1)
        return found

    def checkpoints(self, store: ObjectStore, ledger: Witnessed) -> CheckpointStore:
        return self.mutation.checkpoints(store, RUN, ledger, clock=self.now, monotonic=self.now)

    def now(self) -> float:
        """Counts turns: it orders nothing, and a replay shows the same numbers."""
        return float(self.interleaving.turn)

    def odds(self, likely: float) -> bool:
        return self.chance.random() < likely


def _no_snapshot() -> None:
    return None


def play(seed: int, mutation: Mutation | None = None, *, record: bool = False) -> Verdict:
    """Live one seed's history and judge it."""
    chance = random.Random(seed)
    mutation = mutation or Mutation()
    interleaving = Interleaving(
        chance, MemoryStore(), faults=chance.choice(FAULTS), torn_create=mutation.torn_create, record=record
    )
    with contextlib.ExitStack() as after:
        world = World(interleaving, chance, mutation, after, chance.choice(LAST_STEPS))
        interleaving.spawn("controller A", lambda seat: control(world, seat))
        if world.odds(0.45):
            interleaving.spawn("controller B", lambda seat: control(world, seat))
        if world.odds(0.3):
            interleaving.spawn("gc", lambda seat: collect(world, seat))
        if world.odds(0.15):
            interleaving.spawn("person", lambda seat: meddle(world, seat))
        if world.odds(0.05):
            interleaving.spawn("rot", lambda seat: rot(world))
        interleaving.run()
        found = list(interleaving.problems)
        if world.odds(0.15):
            found += succeed(world)
        found += violations(interleaving.inner, RUN, world.testimony, damaged=world.damaged)
    return Verdict(seed, found, interleaving.history)


# What the actors do. Each decides like its model in the orchestrator or the trainer, only with more variety.


def control(world: World, store: Seat) -> None:
    """A controller: claims the run, gives up attempts that it takes for lost, cleans up, and ends the run."""
    ledger = world.ledger(store)
    checkpoints = world.checkpoints(store, ledger)
    state = RunState()
    for _ in range(world.chance.randint(2, 5)):
        try:
            if not world.odds(0.15):  # else it acts on what it knew before
                state = ledger.refresh()
            if state.finished:
                tidy(world, checkpoints, state)
            elif state.running is None:
                next_attempt(world, ledger, state)
            else:
                watch(world, ledger, state)
            if world.odds(0.5):
                tidy(world, checkpoints, state)
        except (Fenced, Unavailable):
            continue


def next_attempt(world: World, ledger: Witnessed, state: RunState) -> None:
    """Decide on a run that nobody works on: it is over, or somebody is to work on it."""
    now = world.now()
    if state.result:
        ledger.append(Finished(outcome=Outcome.SUCCEEDED, at=now))
    elif state.cancel_requested:
        ledger.append(Finished(outcome=Outcome.CANCELLED, at=now))
    elif state.attempt < MOST_ATTEMPTS:
        who = f"{world.chance.getrandbits(32):08x}"
        claimed = Claimed(attempt=state.attempt + 1, incarnation=who, node="n", slot="n/0", at=now)
        ledger.append(claimed)
        start(world, claimed)


def watch(world: World, ledger: Witnessed, state: RunState) -> None:
    """Decide on a running attempt: it is started, taken for lost, or the run is over."""
    assert state.running
    now = world.now()
    start(world, state.running.claimed)
    if state.result and world.odds(0.7):
        ledger.append(Finished(outcome=Outcome.SUCCEEDED, at=now))
    elif world.odds(0.35):
        ledger.append(Ended(attempt=state.attempt, reason=EndReason.NODE_LOST, at=now))


def start(world: World, claimed: Claimed) -> None:
    """Order the attempt's trainer, once: an order that is repeated is not a second process."""
    if claimed.incarnation not in world.spawned:
        world.spawned.add(claimed.incarnation)
        world.interleaving.spawn(f"trainer {claimed.attempt}", lambda seat: train(world, seat, claimed))


def train(world: World, store: Seat, claimed: Claimed) -> None:
    """An attempt: resumes, and commits step after step until it is done or told that it is fenced."""
    ledger = world.ledger(store)
    checkpoints = world.checkpoints(store, ledger)
    attempt = claimed.attempt
    try:
        state = patiently(ledger.refresh)
        if world.odds(0.05) or world.damaged:
            resumed = patiently(lambda: resume(world, checkpoints, state, attempt))
        else:
            resumed = state.committed_step
        patiently(lambda: ledger.append(Started(attempt=attempt, step=resumed, at=world.now())))
        at_its_last_step = resumed == world.last_step  # saved there, and stopped before its evaluation
        for step in [world.last_step] if at_its_last_step else range(resumed + 1, world.last_step + 1):
            if world.odds(0.1):  # there is little time: the adapter first, and the rest if it lasts
                salvage(checkpoints, local_checkpoint(attempt, step, final=False), claimed)
            stopped = step == world.last_step and not at_its_last_step and world.odds(0.2)
            publish(
                checkpoints,
                local_checkpoint(attempt, step, final=step == world.last_step and not stopped),
                claimed,
            )
    except Fenced:
        return
    except Unavailable:
        return  # it gives up, and its successor goes on from the last commit
    except (Corrupt, NotFound):
        if not world.damaged:
            raise


def resume(world: World, checkpoints: CheckpointStore, state: RunState, attempt: int) -> int:
    """Fetch the checkpoint to resume from, and check that it is the one that was committed."""
    where = Path(world.after.enter_context(tempfile.TemporaryDirectory(dir=_memory_disk())))
    checkpoint, path = checkpoints.fetch_newest(state, where, attempt=attempt)
    if checkpoint is None or path is None:
        return 0
    if read_files(path) != contents(checkpoint.attempt, checkpoint.step):
        world.interleaving.problems.append(f"attempt {attempt} resumed from other bytes: {checkpoint.ref}")
    return checkpoint.step


def salvage(checkpoints: CheckpointStore, local: LocalCheckpoint, claimed: Claimed) -> None:
    """Publish the adapter alone, once."""
    with contextlib.suppress(Unavailable):
        checkpoints.publish(local, claimed.attempt, claimed.incarnation, only=["adapter"])


def publish(checkpoints: CheckpointStore, local: LocalCheckpoint, claimed: Claimed) -> None:
    """Publish a checkpoint as the replicator does: again if there was no answer; the next one takes over."""
    for _ in range(TRIES):
        try:
            checkpoints.publish(local, claimed.attempt, claimed.incarnation)
            return
        except Unavailable:
            continue


def tidy(world: World, checkpoints: CheckpointStore, state: RunState) -> None:
    """Prune, delete, sweep: what a controller does between its other work, possibly by an old state."""
    if world.odds(0.6) and (refs := superfluous(state, world.chance.choice((1, 1, 2)))):
        checkpoints.retire(refs)
    if world.odds(0.6):
        state = checkpoints.reap(state, grace_s=world.chance.choice((0.0, 0.0, 6.0)))
    if world.odds(0.4):
        checkpoints.sweep_orphans(state)


def superfluous(state: RunState, keep_last: int) -> list[CheckpointRef]:
    return plan_prune(state.checkpoints, keep_last=keep_last, pinned=state.pinned)


def collect(world: World, store: Seat) -> None:
    """``gc`` from a laptop: looks once, acts on what it saw then, possibly twice."""
    ledger = world.ledger(store)
    for _ in range(world.chance.randint(1, 2)):
        try:
            state = ledger.refresh()
            objects = take(store).runs.get(RUN, RunObjects())
            if world.odds(0.3):
                state = ledger.refresh()
        except Unavailable:
            continue
        keep = Keep(last=world.chance.choice((1, 2)))
        plan = plan_run(RUN, objects, state, (), keep=keep, grace_s=0.0, now_s=None)
        for _ in range(world.chance.choice((1, 1, 2))):
            for _ in collect_run(store, plan, ledger, clock=world.now):
                pass


def meddle(world: World, store: Seat) -> None:
    """A person: pins a checkpoint, unpins it, cancels the run."""
    ledger = world.ledger(store)
    try:
        state = patiently(ledger.refresh)
        if world.odds(0.5) and state.newest:
            ref = state.newest.ref
            patiently(lambda: ledger.append(Pinned(checkpoint=ref, at=world.now())))
            if world.odds(0.5):
                patiently(lambda: ledger.append(Unpinned(checkpoint=ref, at=world.now())))
        else:
            patiently(lambda: ledger.append(CancelRequested(at=world.now())))
    except (Fenced, Unavailable):
        return


def rot(world: World) -> None:
    """A disk in the store: spoils a file of the newest checkpoint there is at some time."""
    for _ in range(world.chance.randint(5, 60)):
        world.interleaving.pause()
    state = run_log(world.interleaving.inner, RUN).refresh()
    if state.newest and not state.finished:
        key = layout.committed_file(RUN, state.newest, state.newest.files[0].name)
        world.damaged.add(key)
        world.interleaving.inner.put(key, b"rot")
        world.interleaving.note(f"rot: {key}")


def succeed(world: World) -> list[str]:
    """Return what a calm successor cannot do, or leaves behind."""
    try:
        over = settle(world)
    except StorageError as error:
        return [f"the successor cannot go on: {type(error).__name__}: {error}"]
    return [f"left behind: {key}" for key in leftovers(world.interleaving.inner, RUN, over)]


def settle(world: World) -> RunState:
    """What whoever comes last can always do: take the run to its end, and leave nothing behind."""
    store = world.interleaving.inner
    ledger = world.ledger(store, hinted=False)  # what a false snapshot says is as good as old news
    checkpoints = world.checkpoints(store, ledger)
    state, now = ledger.refresh(), world.now()
    if not state.finished:
        if state.running:
            state = ledger.append(Ended(attempt=state.attempt, reason=EndReason.NODE_LOST, at=now))
        if not state.result and not state.cancel_requested:
            claimed = Claimed(attempt=state.attempt + 1, incarnation="f" * 8, node="n", slot="n/0", at=now)
            state = ledger.append(claimed)
            if not world.damaged and world.odds(0.1):
                resume(world, checkpoints, state, claimed.attempt)
            checkpoints.publish(
                local_checkpoint(claimed.attempt, world.last_step, final=True),
                claimed.attempt,
                claimed.incarnation,
            )
            state = ledger.refresh()
        outcome = Outcome.SUCCEEDED if state.result else Outcome.CANCELLED
        state = ledger.append(Finished(outcome=outcome, at=now))
    if refs := superfluous(state, 1):
        state = ledger.append(Retired(checkpoints=tuple(refs), at=now))
    state = checkpoints.reap(state)
    checkpoints.sweep_orphans(state)
    return state


def patiently(ask: Callable[[], T]) -> T:
    """Ask a few times.

    Raises:
        Unavailable: There was no answer to any of them.
    """
    for tries_left in reversed(range(TRIES)):
        try:
            return ask()
        except Unavailable:
            if not tries_left:
                raise
    raise AssertionError("unreachable")


# What a trainer has on its disk: the same for each schedule, so it is written once per process.


def contents(attempt: int, step: int) -> dict[str, bytes]:
    """The files of a checkpoint: unlike those of any other attempt and step."""
    files = {"adapter": b"adapter %d %d" % (attempt, step)}
    return files | {"state": b"state %d %d" % (attempt, step)} if step % 2 else files


@cache
def local_checkpoint(attempt: int, step: int, *, final: bool) -> LocalCheckpoint:
    root = _node_disk() / f"{attempt}-{final}"
    temporary = temporary_dir(root)
    for name, body in contents(attempt, step).items():
        (temporary / name).write_bytes(body)
    manifest = Manifest(step=step, final=final, metrics={}, files=hash_files(temporary, metrics={}))
    seal(temporary, manifest, root / step_dir(step))
    local = read_checkpoint(root / step_dir(step))
    assert local is not None
    return local


@cache
def _node_disk() -> Path:
    directory = tempfile.TemporaryDirectory(dir=_memory_disk())
    _kept.append(directory)
    return Path(directory.name)


_kept: list[tempfile.TemporaryDirectory[str]] = []


@cache
def _memory_disk() -> str | None:
    """Where there is such a thing: thousands of small files are flushed to it."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


if __name__ == "__main__":
    sys.exit(command(play, "schedules", __doc__))
