"""Brings the store up to date with a directory of checkpoints.

The directory is the truth: a file event, a timer, a retry and ``drain`` all mean only "look again". One
thread publishes whatever complete checkpoint is newest; what was superseded before its upload began is
skipped, so a slow uplink lags but never builds a backlog. It stops for good when the log refuses this
attempt.
"""

import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

from watchdog.events import DirCreatedEvent, DirMovedEvent, FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer

from .errors import Corrupt, Fenced, InvalidName
from .local import LocalCheckpoint, complete_checkpoints, remove, verify

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
"""Between tries of a store that does not answer: doubled each time up to this, less a random share."""
LONGEST_PAUSE_DRAINING_S = 1.0
"""A node that is about to go does not wait politely."""

logger = logging.getLogger(__name__)


class Replicator:
    """Publishes the newest checkpoint of a directory until told to stop.

    Args:
        publish: Uploads and commits one checkpoint. Called from one thread. ``Fenced`` ends replication,
            ``Corrupt`` and ``InvalidName`` give up on that checkpoint, whatever else it raises is tried
            again.
        on_fenced: Called once, from the upload thread.
        on_error: Told about every other failure, from the upload thread.
        keep_local: How many of the newest checkpoints stay on this disk.
        rescan_s: Seconds between looks that no event asked for: events can be missed.
        after_step: Checkpoints up to this step are published already.
    """

    def __init__(
        self,
        directory: Path,
        publish: Callable[[LocalCheckpoint], object],
        *,
        on_fenced: Callable[[Fenced], None],
        on_error: Callable[[Exception], None] | None = None,
        keep_local: int = 2,
        rescan_s: float = 5.0,
        after_step: int = 0,
    ) -> None:
        if keep_local < 1:
            raise ValueError(f"keep_local must be at least 1, got {keep_local}: the newest is never removed")
        self._directory = directory
        self._publish = publish
        self._on_fenced = on_fenced
        self._on_error = on_error or (lambda error: None)
        self._keep_local = keep_local
        self._rescan_s = rescan_s
        self._published_step = after_step
        self._unusable: set[int] = set()
        self._problem: str | None = None
        self._draining = False
        self._stopped = threading.Event()
        self._look_again = threading.Event()
        self._changed = threading.Condition()
        self._observer = Observer()
        self._thread = threading.Thread(target=self._run, name="replicator", daemon=True)

    def start(self) -> None:
        """Begin. What is in the directory already counts as new."""
        directory = self._directory
        directory.mkdir(parents=True, exist_ok=True)
        try:
            self._observer.schedule(_Hint(self._look_again), str(directory))
            self._observer.start()
        except OSError as error:
            # The system is out of watches: looking every rescan_s is slower and loses nothing.
            logger.warning(
                "%s: no file events: %s; looking every %g s", self._directory, error, self._rescan_s
            )
        self._thread.start()

    @property
    def pending(self) -> LocalCheckpoint | None:
        """The checkpoint to publish next: the newest complete one, if it is not published."""
        for checkpoint in complete_checkpoints(self._directory):
            if checkpoint.step <= self._published_step:
                return None
            if checkpoint.step not in self._unusable:
                return checkpoint
        return None

    def drain(self, timeout_s: float) -> bool:
        """Wait until the newest checkpoint is published, with less patience for a store that does not answer.

        Returns:
            Whether the newest checkpoint is published. False at once if replication has ended before.
        """
        deadline = time.monotonic() + timeout_s
        self._look_again.set()
        with self._changed:
            self._draining = True
            self._changed.notify_all()
            while self.pending is not None:
                left_s = deadline - time.monotonic()
                if left_s <= 0 or self._stopped.is_set() or not self._thread.is_alive():
                    return False
                self._changed.wait(left_s)
        newest = next(iter(complete_checkpoints(self._directory)), None)
        return newest is None or newest.step <= self._published_step

    def stop(self) -> None:
        """End replication. An upload that is under way is left to finish or to die with the process."""
        self._end()
        if self._observer.is_alive():
            self._observer.stop()
            self._observer.join()

    def _run(self) -> None:
        try:
            self._replicate()
        finally:
            self._end()

    def _replicate(self) -> None:
        pause_s = FIRST_PAUSE_S
        while not self._stopped.is_set():
            self._look_again.clear()
            if self._bring_up_to_date():
                pause_s = FIRST_PAUSE_S
                self._look_again.wait(self._rescan_s)
            else:
                if self._draining:
                    pause_s = min(pause_s, LONGEST_PAUSE_DRAINING_S)
                self._pause(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(pause_s * 2, LONGEST_PAUSE_S)

    def _bring_up_to_date(self) -> bool:
        """Publish what is pending until nothing is. False if it has to be tried again later."""
        while not self._stopped.is_set():
            try:
                checkpoint = self.pending
                if checkpoint is None:
                    self._remove_superseded()
                    return True
                self._publish_one(checkpoint)
            except Fenced as error:
                logger.warning("%s: replication ends: %s", self._directory, error)
                self._end()
                self._on_fenced(error)
            except Exception as error:
                # Whatever it was, the checkpoint is still there: trying again is the only way not to lose it.
                self._tell(f"{type(error).__name__}: {error}")
                self._remove_superseded()
                self._on_error(error)
                return False
        return True

    def _publish_one(self, checkpoint: LocalCheckpoint) -> None:
        try:
            self._publish(checkpoint)
        except (Corrupt, InvalidName) as error:
            if not _is_to_blame(checkpoint, error):
                raise
            logger.error("%s: will not be published: %s", checkpoint.path, error)
            self._unusable.add(checkpoint.step)
            self._on_error(error)
        else:
            self._tell(None)
            self._published_step = checkpoint.step
        with self._changed:
            self._changed.notify_all()

    def _tell(self, problem: str | None) -> None:
        """Log a change, once: the store may be away for hours."""
        if problem != self._problem:
            logger.warning("%s: %s", self._directory, problem or "publishing again")
        self._problem = problem

    def _remove_superseded(self) -> None:
        """Remove all but the newest usable checkpoints: an older one is of no use any more."""
        usable = [c for c in complete_checkpoints(self._directory) if c.step not in self._unusable]
        for checkpoint in usable[self._keep_local :]:
            with contextlib.suppress(OSError):
                remove(checkpoint.path)

    def _pause(self, pause_s: float) -> None:
        """Wait before the next try. A drain that begins meanwhile ends the wait, a mere hint does not."""
        deadline = time.monotonic() + pause_s
        patient = not self._draining
        with self._changed:
            while not self._stopped.is_set() and (left_s := deadline - time.monotonic()) > 0:
                if patient and self._draining:
                    return
                self._changed.wait(left_s)

    def _end(self) -> None:
        self._stopped.set()
        self._look_again.set()
        with self._changed:
            self._changed.notify_all()


def _is_to_blame(checkpoint: LocalCheckpoint, error: Corrupt | InvalidName) -> bool:
    """Whether it is the local checkpoint that is unusable, and not, say, the run's log."""
    if isinstance(error, InvalidName):
        return True
    try:
        verify(checkpoint.path, checkpoint.manifest.files)
    except Corrupt:
        return True
    return False


class _Hint(FileSystemEventHandler):
    """Turns the appearance of a directory into "look again". Reading the directory causes no such event."""

    def __init__(self, look_again: threading.Event) -> None:
        self._look_again = look_again

    def on_moved(self, event: FileSystemEvent) -> None:
        if isinstance(event, DirMovedEvent):
            self._look_again.set()

    def on_created(self, event: FileSystemEvent) -> None:
        if isinstance(event, DirCreatedEvent):
            self._look_again.set()
