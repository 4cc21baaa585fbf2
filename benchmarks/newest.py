"""How long it takes to find the newest checkpoint of a long log, and to start a controller over many runs.

    python benchmarks/newest.py [--records 10000] [--runs 10000] [--server-runs 1000] [--save]

Each is measured from a snapshot and without any, where every record is read; the ratio is what the snapshot
saves. On a folder, and on a real S3 server on loopback (rclone), where requests cost what they cost there.
The logs are written past the store, as files: only reading is measured.
"""

import argparse
import contextlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from harness import BenchmarkFailed, conclude, run, show, wait_for

from orchestrator.control.cluster import NoCluster
from orchestrator.control.controller import Controller
from orchestrator.grid.schema import Checkpoint, Storage
from orchestrator.grid.sweep import PlannedRun, Sweep
from storage import layout
from storage.log import RunSnapshot, run_log
from storage.memory import MemoryStore
from storage.object_store import ObjectInfo, ObjectStore
from storage.records import (
    CheckpointRef,
    Claimed,
    Committed,
    Ended,
    EndReason,
    Finished,
    Outcome,
    Reaped,
    Record,
    Retired,
    Started,
    StoredFile,
)
from storage.snapshots import (
    Known,
    hinted_log,
    write_run,
    write_sweep,
)
from storage.url import open_store
from trainer.config import Base, Dataset, RunSpec

LONG_RUN = "long"
TAIL = 4
"""Records that came after the snapshot: it is written every so often."""


class Counting:
    """An ``ObjectStore`` that counts what is asked of it. A listing of several pages counts as one."""

    def __init__(self, inner: ObjectStore) -> None:
        self._inner = inner
        self._lock = threading.Lock()
        self.requests = 0

    def _count(self) -> ObjectStore:
        with self._lock:
            self.requests += 1
        return self._inner

    @property
    def url(self) -> str:
        return self._inner.url

    def put(self, key: str, body: bytes | Path) -> None:
        self._count().put(key, body)

    def create(self, key: str, body: bytes) -> bool:
        return self._count().create(key, body)

    def get(self, key: str) -> bytes:
        return self._count().get(key)

    def download(self, key: str, target: Path) -> None:
        self._count().download(key, target)

    def head(self, key: str) -> ObjectInfo | None:
        return self._count().head(key)

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        return self._count().list(prefix, after)

    def delete(self, keys: Iterable[str]) -> None:
        if doomed := tuple(keys):
            self._count().delete(doomed)

    def abort_uploads(self, prefix: str) -> int:
        return self._count().abort_uploads(prefix)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def committed(step: int, *, final: bool = False) -> Committed:
    names = ("adapter.safetensors", "state/optimizer.safetensors", "state/loop.json")
    files = tuple(StoredFile(name=n, size_bytes=1 << 20, sha256=f"{step:064x}") for n in names)
    return Committed(
        attempt=1,
        incarnation="0" * 8,
        step=step,
        files=files,
        metrics={"train/loss": 0.1},
        final=final,
        at=2.0,
    )


def history(records: int, *, over: bool) -> Iterator[Record]:
    """A run that keeps two checkpoints: commits, each older one retired and reaped."""
    yield Claimed(attempt=1, incarnation="0" * 8, node="n1", slot="n1/0", at=1.0)
    yield Started(attempt=1, step=0, at=2.0)
    written, step = 2, 0
    while written < records - 2:
        step += 10
        yield committed(step)
        written += 1
        if step > 20:
            old = (CheckpointRef(step=step - 20, attempt=1),)
            yield Retired(checkpoints=old, at=3.0)
            yield Reaped(checkpoints=old, at=4.0)
            written += 2
    if over:
        yield committed(step + 10, final=True)
        yield Finished(outcome=Outcome.SUCCEEDED, step=step + 10, at=5.0)
    else:
        yield committed(step + 10)
        yield Ended(attempt=1, reason=EndReason.SPOT_NOTICE, at=5.0)


class LogFiles:
    """One log's entries as they lie in a store, and the snapshot of all but the last few."""

    def __init__(self, records: int, *, over: bool, tail: int) -> None:
        store = MemoryStore()
        log = run_log(store, "run")
        snapshots: list[RunSnapshot] = []
        for record in history(records, over=over):
            log.append(record)
            if snapshot := log.snapshot():
                snapshots.append(snapshot)
        self.snapshot = snapshots[-1 - tail]
        self.committed_step = log.state.committed_step
        self.bodies = [store.get(info.key) for info in store.list(layout.run_log_prefix("run"))]

    def lay(self, root: Path, run_id: str) -> None:
        prefix = layout.run_log_prefix(run_id)
        (root / prefix).mkdir(parents=True)
        for n, body in enumerate(self.bodies):
            (root / layout.log_entry(prefix, n)).write_bytes(body)


def measured(store: ObjectStore, work: Callable[[ObjectStore], object]) -> dict[str, float]:
    counting = Counting(store)
    began = time.perf_counter()
    work(counting)
    return {"s": round(time.perf_counter() - began, 4), "requests": counting.requests}


def fastest(tries: int, store: ObjectStore, work: Callable[[ObjectStore], object]) -> dict[str, float]:
    work(store)  # connections, imports and the disk's cache are not what is measured
    return min((measured(store, work) for _ in range(tries)), key=lambda figures: figures["s"])


def newest(store: ObjectStore, files: LogFiles) -> dict[str, Any]:
    """The newest checkpoint of a long log."""

    def find(log_of: Callable[[ObjectStore, str], Any]) -> Callable[[ObjectStore], None]:
        def work(asked: ObjectStore) -> None:
            if log_of(asked, LONG_RUN).refresh().committed_step != files.committed_step:
                raise BenchmarkFailed("another checkpoint was found")

        return work

    every = measured(store, find(run_log))
    write_run(store, LONG_RUN, files.snapshot)
    hinted = fastest(5, store, find(hinted_log))
    return {"every": every, "snapshot": hinted, "ratio": round(hinted["s"] / every["s"], 4)}


def sweep_of(run_ids: list[str]) -> Sweep:
    spec = RunSpec(base=Base(model="owner/model", max_train_steps=100_000), dataset=Dataset(path="/data"))
    return Sweep(
        name="bench",
        storage=Storage(url="memory://bench"),
        checkpoint=Checkpoint(keep_last=4),  # more than there are: nothing is to be retired
        runs=tuple(
            PlannedRun(run_id=run_id, index=index, parameters={"seed": index}, spec=spec)
            for index, run_id in enumerate(run_ids)
        ),
    )


def start(
    store: ObjectStore, sweep: Sweep, known: Mapping[str, Known] | None, expect: Mapping[str, int]
) -> dict[str, float]:
    """A controller's first tick, on a cluster without slots: it reads, and there is nothing to launch."""
    store.delete([layout.sweep_snapshot(sweep.name)])
    if known is not None:
        write_sweep(store, sweep.name, known)

    def work(asked: ObjectStore) -> None:
        controller = Controller(sweep, asked, NoCluster())
        controller.tick()
        if {run_id: s.committed_step for run_id, s in controller.states.items()} != expect:
            raise BenchmarkFailed("the controller knows something else than the logs say")

    return measured(store, work)


def lay_runs(root: Path, runs: int) -> tuple[dict[str, LogFiles], LogFiles]:
    """Write the logs of many runs, half of them over; returns them, and one that is over."""
    over, left = LogFiles(14, over=True, tail=0), LogFiles(14, over=False, tail=0)
    kinds = {f"run-{n:05d}": over if n % 2 else left for n in range(runs)}
    for run_id, files in kinds.items():
        files.lay(root, run_id)
    return kinds, over


def starts(store: ObjectStore, kinds: Mapping[str, LogFiles], over: LogFiles) -> dict[str, Any]:
    """Controller starts over runs of which half are over; then over as many that are all over."""
    known = {run_id: Known(snapshot=files.snapshot, tidy=files is over) for run_id, files in kinds.items()}
    expect = {run_id: files.committed_step for run_id, files in kinds.items()}
    sweep = sweep_of(list(kinds))
    half = start(store, sweep, known, expect)
    without = start(store, sweep, None, expect)
    finished = dict.fromkeys(kinds, over)
    all_over = start(
        store,
        sweep,
        {run_id: Known(snapshot=over.snapshot, tidy=True) for run_id in finished},
        dict.fromkeys(finished, over.committed_step),
    )
    return {
        "runs": len(kinds),
        "all_over": all_over,
        "half_over": half,
        "without": without,
        "ratio_half_over": round(half["s"] / without["s"], 4),
        "ratio_all_over": round(all_over["s"] / without["s"], 4),
    }


@contextlib.contextmanager
def served(root: Path) -> Iterator[str]:
    """Serve the folders in ``root`` as buckets by rclone; yields the url of the bucket ``store``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    key, secret = "benchmarkkey0001", secrets.token_hex(16)
    os.environ.update(AWS_ACCESS_KEY_ID=key, AWS_SECRET_ACCESS_KEY=secret)
    program = Path(sys.executable).with_name("rclone")
    command = [str(program), "serve", "s3", "--addr", address, "--auth-key", f"{key},{secret}", str(root)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env={**os.environ, "RCLONE_CONFIG": os.devnull}, **quiet) as server:  # type: ignore[call-overload]
        try:
            wait_for(lambda: _answers(address), "rclone to answer", timeout_s=20.0)
            yield f"s3://store?endpoint=http://{address}&region=us-east-1"
        finally:
            server.kill()


def _answers(address: str) -> bool:
    host, _, port = address.partition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1.0).close()
    except OSError:
        return False
    return True


def figures_of(place: str, root: Path, records: int, runs: int) -> dict[str, Any]:
    """Lay the logs, serve them if they are to be served, and measure."""
    print(f"{place}: writing a log of {records} records and {runs} short ones", file=sys.stderr)
    folder = root / place / "store"
    long = LogFiles(records, over=False, tail=TAIL)
    long.lay(folder, LONG_RUN)
    kinds, over = lay_runs(folder, runs)
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(served(folder.parent)) if place == "rclone" else folder.as_uri()
        store = open_store(url)
        return {"newest": newest(store, long), "start": starts(store, kinds, over)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=10_000, help="on the folder")
    parser.add_argument("--server-runs", type=int, default=1000, help="on the server")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="newest-") as scratch:
        figures = {
            place: figures_of(place, Path(scratch), options.records, runs)
            for place, runs in (("folder", options.runs), ("rclone", options.server_runs))
        }
    rows = []
    for place, measured_there in figures.items():
        found, started = measured_there["newest"], measured_there["start"]
        rows += [
            _row(f"{place}: newest of {options.records} records, every record read", found["every"]),
            _row("  from the run's snapshot", found["snapshot"], found["ratio"]),
            _row(f"{place}: start over {started['runs']} runs, every record read", started["without"]),
            _row("  from a snapshot, half are over", started["half_over"], started["ratio_half_over"]),
            _row("  from a snapshot, all are over", started["all_over"], started["ratio_all_over"]),
        ]
    show("Starting from what is in the store", ("", "s", "requests", "of reading all"), rows)
    conclude("newest", figures, save=options.save)


def _row(name: str, figures: Mapping[str, float], ratio: float | None = None) -> tuple[str, str, str, str]:
    return name, f"{figures['s']:.3f}", f"{figures['requests']:.0f}", "" if ratio is None else f"{ratio:.4f}"


if __name__ == "__main__":
    run(main)
