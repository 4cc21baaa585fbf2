"""Brings events, log and sample images of an attempt to the store while it runs, in batches.

Best effort: what cannot be sent now is sent with the next batch, and nothing here can stop or slow training.
Only what belongs to the result must be there before the result is: ``ship_results``.
An object is named by its position in the sequence and written whole, so a batch sent twice is the same batch.
"""

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path

from storage import layout
from storage.errors import InvalidName, StorageError
from storage.object_store import ObjectStore
from storage.redaction import redacted

from .rundir import RunDir

MAX_BATCH_BYTES = 4_000_000


class Shipper:
    """Ships one attempt's files every ``every_s`` seconds and once more at the end."""

    def __init__(
        self, store: ObjectStore, run_id: str, attempt: int, run_dir: RunDir, every_s: float = 5.0
    ) -> None:
        self._store = store
        self._run_id = run_id
        self._run_dir = run_dir
        self._every_s = every_s
        self._events = _Tail(run_dir.events, lambda n: layout.events_key(run_id, attempt, n))
        self._log = _Tail(run_dir.log, lambda n: layout.log_text_key(run_id, attempt, n))
        self._shipped_samples: set[str] = set()
        self._one_at_a_time = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"shipper-{run_id}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def ship_results(self) -> None:
        """Ship the samples and events that there are, now.

        Raises:
            StorageError, OSError: Not all of it is in the store; call again.
        """
        with self._one_at_a_time:
            while self._events.ship(self._store, to_the_end=False):
                pass
            self._ship_samples()

    def finish(self, timeout_s: float) -> None:
        """Ship what is left and stop, giving up after ``timeout_s``. Does nothing if it was not started."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            self._ship()
        self._ship(all_of_it=True)

    def _ship(self, *, all_of_it: bool = False) -> None:
        with self._one_at_a_time:
            for ship in (self._events.ship, self._log.ship):
                with contextlib.suppress(StorageError, OSError):
                    while ship(self._store, to_the_end=all_of_it) and all_of_it:
                        pass
            with contextlib.suppress(StorageError, OSError):
                self._ship_samples()

    def _ship_samples(self) -> None:
        for folder in sorted(self._run_dir.samples.glob("step-" + "[0-9]" * 9)):
            if folder.name in self._shipped_samples:
                continue
            step = int(folder.name.removeprefix("step-"))
            for file in sorted(f for f in folder.iterdir() if f.is_file()):
                with contextlib.suppress(InvalidName):  # which no other try would make a name
                    self._store.put(layout.sample_key(self._run_id, step, file.name), file)
            self._shipped_samples.add(folder.name)


def _redacted(batch: bytes) -> bytes:
    return redacted(batch.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")


class _Tail:
    """Sends what was appended to a file as numbered objects, redacted: whole lines, until it has ended."""

    def __init__(self, path: Path, key: Callable[[int], str]) -> None:
        self._path = path
        self._key = key
        self._offset = 0
        self._next = 0

    def ship(self, store: ObjectStore, *, to_the_end: bool) -> bool:
        """Send the next batch, if there is one; says whether there was."""
        if not self._path.exists():
            return False
        with self._path.open("rb") as file:
            file.seek(self._offset)
            batch = file.read(MAX_BATCH_BYTES)
        if not to_the_end:
            batch = batch[: batch.rfind(b"\n") + 1] or (batch if len(batch) == MAX_BATCH_BYTES else b"")
        if not batch:
            return False
        store.put(self._key(self._next), _redacted(batch))
        self._offset += len(batch)
        self._next += 1
        return True
