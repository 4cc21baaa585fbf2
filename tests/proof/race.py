"""Eight writers with random stalls claim, commit, retire and give each other up, on every real store at once.

    python -m proof.race --seconds 60

Where the race probe finds ``create`` atomic, the writers are eight processes that append to the logs
themselves. Where it does not, their records go through one appender, as they do through the controller, and
they only upload. The last line counts what ``invariants`` finds wrong in each store: none. Only rclone used
directly, against the probe's word, has violations: it shows that the check can fail.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from support.invariants import Told, Witnessed, violations
from support.runs import write_checkpoint
from support.s3_servers import (
    S3Server,
    radosgw_server,
    rclone_server,
    swift_server,
    why_no_radosgw,
    why_no_swift,
)

from storage.checkpoints import CheckpointStore
from storage.errors import (
    Corrupt,
    Fenced,
    StorageError,
    Unavailable,
)
from storage.ledger import Ledger
from storage.log import RunLog, run_log
from storage.object_store import ObjectStore
from storage.probe import race_probe
from storage.records import (
    Claimed,
    Ended,
    EndReason,
    Finished,
    Outcome,
    Record,
    Started,
)
from storage.retention import plan_prune
from storage.run_state import RunState
from storage.url import open_store

WRITERS = 8
LAST_STEP = 15
"""A run that is committed so far is finished, and all writers meet in the next."""
SHORT_STALL_S = 0.01
LONG_STALL_S = 0.8
GIVE_UP, TIDY, LONG = 0.04, 0.2, 0.06
"""How often a writer takes the owner for lost, cleans up, and stalls for long."""

Connect = Callable[[str], Ledger]


@dataclass(slots=True)
class Seen:
    """What one writer did to each run, and what it saw that must not be."""

    told: dict[str, Told] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a race came to."""

    violations: list[str]
    direct: bool
    records: int
    commits: int
    claims: int


class Arbiter:
    """The one appender for a store whose create-only cannot be trusted."""

    def __init__(self, url: str) -> None:
        self._store = open_store(url, check_then_put=True)
        self._logs: dict[str, RunLog] = {}
        self._lock = threading.Lock()

    def log(self, run_id: str) -> RunLog:
        with self._lock:
            return self._logs.setdefault(run_id, run_log(self._store, run_id))


@dataclass(frozen=True, slots=True)
class Arbitrated:
    """A ledger that reads the store and appends through the arbiter."""

    own: RunLog
    arbiter: RunLog

    def refresh(self) -> RunState:
        return self.own.refresh()

    def append(self, record: Record) -> RunState:
        return self.arbiter.append(record)


class Writer:
    """Somebody who works on the runs, believes that everybody else is dead, and wakes up late."""

    def __init__(self, number: int, store: ObjectStore, connect: Connect, disk: Path) -> None:
        self._chance = random.Random(number)
        self._store = store
        self._connect = connect
        self._disk = disk
        self._seen = Seen()

    def work(self, seconds: float) -> Seen:
        until = time.monotonic() + seconds
        run = 0
        while time.monotonic() < until:
            run_id = f"race-{run:06d}"
            told = self._seen.told.setdefault(run_id, Told())
            try:
                self._live(run_id, Witnessed(self._connect(run_id), told), until)
            except (Corrupt, AssertionError) as error:
                self._seen.wrong.append(f"{run_id}: {type(error).__name__}: {error}")
            run += 1
        return self._seen

    def _live(self, run_id: str, ledger: Witnessed, until: float) -> None:
        """Work on one run until it is finished."""
        checkpoints = CheckpointStore(self._store, run_id, ledger)
        mine: Claimed | None = None
        while time.monotonic() < until:
            with contextlib.suppress(Fenced, Unavailable):
                state = ledger.refresh()
                if state.finished:
                    return
                self._stall()  # what it decides by is old when it acts
                mine = self._act(ledger, checkpoints, state, mine)

    def _act(
        self, ledger: Witnessed, checkpoints: CheckpointStore, state: RunState, mine: Claimed | None
    ) -> Claimed | None:
        if state.committed_step >= LAST_STEP:
            ledger.append(Finished(outcome=Outcome.SUCCEEDED, at=time.time()))
        elif state.running is None:
            return self._claim(ledger, checkpoints, state)
        elif state.running.claimed != mine and self._chance.random() < GIVE_UP:
            ledger.append(Ended(attempt=state.attempt, reason=EndReason.NODE_LOST, at=time.time()))
        elif mine:  # and if it is not its own any more, it is a ghost that does not know
            self._commit(checkpoints, state, mine)
        if self._chance.random() < TIDY:
            self._tidy(checkpoints, state)
        return mine

    def _claim(self, ledger: Witnessed, checkpoints: CheckpointStore, state: RunState) -> Claimed:
        who = f"{self._chance.getrandbits(32):08x}"
        claimed = Claimed(attempt=state.attempt + 1, incarnation=who, node=who, slot=who, at=time.time())
        state = ledger.append(claimed)
        checkpoint, _ = checkpoints.fetch_newest(state, self._disk / who, attempt=claimed.attempt)
        step = checkpoint.step if checkpoint else 0
        ledger.append(Started(attempt=claimed.attempt, step=step, at=time.time()))
        return claimed

    def _commit(self, checkpoints: CheckpointStore, state: RunState, mine: Claimed) -> None:
        step = state.committed_step + 1
        body = f"step {step} of {mine.incarnation} ".encode() * 20
        local = write_checkpoint(self._disk / f"of-{mine.incarnation}", step, files={"adapter": body})
        self._stall()
        checkpoints.publish(local, mine.attempt, mine.incarnation)

    def _tidy(self, checkpoints: CheckpointStore, state: RunState) -> None:
        checkpoints.retire(plan_prune(state.checkpoints, keep_last=2))
        checkpoints.reap(state)
        checkpoints.sweep_orphans(state)

    def _stall(self) -> None:
        if self._chance.random() < LONG:
            time.sleep(self._chance.uniform(0, LONG_STALL_S))
        else:
            time.sleep(self._chance.uniform(0, SHORT_STALL_S))


def race(url: str, seconds: float, disk: Path, *, direct: bool) -> Result:
    """Let the writers loose on an empty store, and judge what they leave."""
    with _writers(url, seconds, disk, direct=direct) as (pool, work):
        seen = list(pool.map(work, range(WRITERS)))
    told: dict[str, Told] = {}
    for one in seen:
        for run_id, testimony in one.told.items():
            told.setdefault(run_id, Told()).add(testimony)
    found = [line for one in seen for line in one.wrong]
    store, acknowledged = open_store(url), list[Record]()
    for run_id, testimony in told.items():
        try:
            found += [f"{run_id}: {line}" for line in violations(store, run_id, testimony)]
        except StorageError as error:
            found.append(f"{run_id}: {type(error).__name__}: {error}")
        acknowledged += testimony.acknowledged
    kinds = [record.kind for record in acknowledged]
    return Result(
        violations=found,
        direct=direct,
        records=len(kinds),
        commits=kinds.count("committed"),
        claims=kinds.count("claimed"),
    )


@contextlib.contextmanager
def _writers(
    url: str, seconds: float, disk: Path, *, direct: bool
) -> Iterator[tuple[Executor, Callable[[int], Seen]]]:
    """Yield who runs the writers, and what each does."""
    if direct:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(
            WRITERS, context, initializer=_wait_for_all, initargs=(context.Barrier(WRITERS),)
        ) as pool:
            yield pool, _Direct(url, seconds, disk)
        return
    arbiter = Arbiter(url)
    store = open_store(url)

    def work(number: int) -> Seen:
        def connect(run_id: str) -> Ledger:
            return Arbitrated(run_log(store, run_id), arbiter.log(run_id))

        return Writer(number, store, connect, disk / str(number)).work(seconds)

    with ThreadPoolExecutor(WRITERS) as threads:
        yield threads, work


@dataclass(frozen=True, slots=True)
class _Direct:
    """The work of a writer that is a process of its own."""

    url: str
    seconds: float
    disk: Path

    def __call__(self, number: int) -> Seen:
        store = open_store(self.url)
        writer = Writer(number, store, lambda run_id: run_log(store, run_id), self.disk / str(number))
        return writer.work(self.seconds)


def _wait_for_all(ready: threading.Barrier) -> None:
    """Begin when all processes have: importing takes longer than a short race."""
    ready.wait()


# The command.


def race_on(server: S3Server, seconds: float, disk: Path, name: str) -> Result:
    """Race on a server, directly if the probe says that one may."""
    os.environ.update(server.environment)
    probed = race_probe(open_store(server.url_of(f"{name}-probe")))
    print(f"{name}: {'direct' if probed.atomic else 'arbitrated'}: {probed.reason}", flush=True)
    return race(server.url_of(name), seconds, disk / name, direct=probed.atomic)


def main() -> int:
    parser = argparse.ArgumentParser(description="Race eight writers on each real store.")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long each race lasts")
    seconds = parser.parse_args().seconds
    results: dict[str, Result | None] = dict.fromkeys(("folder", "radosgw", "rclone", "swift"))
    control = 0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        print("folder: direct", flush=True)
        results["folder"] = race((root / "store").as_uri(), seconds, root / "folder", direct=True)
        for kind, serve, missing in (
            ("radosgw", radosgw_server, why_no_radosgw()),
            ("rclone", rclone_server, None),
            ("swift", swift_server, why_no_swift()),
        ):
            if missing:
                print(f"{kind}: not raced: {missing}", flush=True)
                continue
            (root / f"{kind}-server").mkdir()
            with serve(root / f"{kind}-server") as server:
                results[kind] = race_on(server, seconds, root, kind)
                if kind == "rclone":
                    lied = race(server.url_of("lying"), seconds / 4, root / "lying", direct=True)
                    control = len(lied.violations)
    return _report(results, control)


def _report(results: dict[str, Result | None], control: int) -> int:
    for name, result in results.items():
        for line in result.violations[:10] if result else ():
            print(f"{name}: {line}")
    raced = {name: result for name, result in results.items() if result}
    counts = {name: len(result.violations) if result else None for name, result in results.items()}
    print(
        json.dumps(
            {
                **counts,
                "rclone_direct": control,
                "mode": {name: "direct" if r.direct else "arbitrated" for name, r in raced.items()},
                "records": {name: r.records for name, r in raced.items()},
                "commits": {name: r.commits for name, r in raced.items()},
                "claims": {name: r.claims for name, r in raced.items()},
            }
        )
    )
    return 1 if any(result.violations for result in raced.values()) or not control else 0


if __name__ == "__main__":
    sys.exit(main())
