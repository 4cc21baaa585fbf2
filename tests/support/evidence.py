"""What a sweep left behind, for tests that interrupt it: the adapter's digest, litter, commits of zombies."""

import contextlib
import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from storage import layout
from storage.checkpoints import CheckpointStore
from storage.log import run_log
from storage.object_store import ObjectStore
from storage.records import Claimed, Committed, RunEntry
from storage.run_state import RunState
from storage.url import open_store
from trainer.config import RunSpec


def adapter(store: ObjectStore, run_id: str, scratch: Path) -> str:
    """The digest of the adapter that a run ended with."""
    log = run_log(store, run_id)
    checkpoint, path = CheckpointStore(store, run_id, log).fetch_newest(log.refresh(), scratch)
    assert checkpoint is not None
    assert checkpoint.final
    assert path is not None
    return hashlib.sha256((path / "adapter.safetensors").read_bytes()).hexdigest()


@contextlib.contextmanager
def trained_alone(
    spec: RunSpec, folder: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Callable[[], str]]:
    """Train a run in a process of its own, without a cluster and without a fault.

    It is called for its adapter's digest: the time until then is not spent waiting.
    """
    folder.mkdir(exist_ok=True)
    file = folder / "spec.json"
    file.write_text(spec.model_dump_json())
    url = f"file://{folder / 'undisturbed'}"
    command = ["run", "--spec", str(file), "--store", url, "--run-id", "calm", "--threads", "1"]
    process = subprocess.Popen([sys.executable, "-m", "trainer", *command], env=environment)

    def result() -> str:
        assert process.wait(timeout=600) == 0
        return adapter(open_store(url), "calm", folder / "calm")

    try:
        yield result
    finally:
        process.kill()
        process.wait()


def litter(store: ObjectStore, run_id: str, state: RunState) -> list[str]:
    """Keys of checkpoint data that no record names."""
    named = {layout.committed_file(run_id, c, f.name) for c in state.checkpoints for f in c.files}
    return [info.key for info in store.list(f"runs/{run_id}/data/") if info.key not in named]


def zombie_commits(entries: Iterable[RunEntry]) -> int:
    """How many commits were let in after a newer attempt had been claimed. The fence leaves none."""
    newest, found = "", 0
    for entry in entries:
        match entry.record:
            case Claimed(incarnation=incarnation):
                newest = incarnation
            case Committed(incarnation=incarnation):
                found += incarnation != newest
    return found
