"""Brings the store up to date with a directory of checkpoints.

The directory is the truth: a file event, a timer, a retry and ``drain`` all mean only "look again". One
thread publishes whatever complete checkpoint is newest; what was superseded before its upload began is
skipped, so a slow uplink lags but never builds a backlog. What cannot be sent stays on the disk, within a
limit that the newest few may exceed. It stops for good when the log refuses this attempt.
"""

import contextlib
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from watchdog.events import DirCreatedEvent, DirMovedEvent, FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver

from .errors import Corrupt, Fenced, InvalidName
from .local import (
    LocalCheckpoint,
    complete_checkpoints,
    newest_first,
    remove,
    size_of,
    verify,
)

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
"""Between tries of a store that does not answer: doubled each time up to this, less a random share."""
LONGEST_PAUSE_DRAINING_S = 1.0
"""A node that is about to go does not wait politely."""

SPOOL_LIMIT_BYTES = 2_000_000_000
NICENESS = 10
"""Packing and sending wait for the training step, never the other way round."""

logger = logging.getLogger(__name__)
# Events are hints, and we see for ourselves when they end: what it says of its own end is no trouble.
logging.getLogger("watchdog").setLevel(logging.CRITICAL)


def superfluous(sizes: Sequence[int], *, keep: int, limit_bytes: int) -> int:
    """Return how many of the oldest checkpoints have to go, for the rest to fit into ``limit_bytes``.

    Args:
        sizes: Bytes of each checkpoint, newest first.
        keep: So many of the newest stay, whatever their size.
    """
    held = 0
    for number, size in enumerate(sizes):
        held += size
        if number >= keep and held > limit_bytes:
            return len(sizes) - number
    return 0


class Replicator:
    """Publishes the newest checkpoint of a directory until told to stop.

    Args:
        publish: Uploads and commits one checkpoint. Called from one thread. ``Fenced`` ends replication,
            ``Corrupt`` and ``InvalidName`` give up on that checkpoint, whatever else it raises is tried
            again.
        on_fenced: Called once, from the upload thread.
        on_error: Told about every other failure, from the upload thread.
        keep_local: How many of the newest checkpoints stay on this disk in any case.
        spool_limit_bytes: What older ones may take besides, while the store cannot be reached: should the
            newest turn out damaged, one of them is what is left. Published, they go.
        rescan_s: Seconds between looks that no event asked for: events can be missed.
    """

    def __init__(
        self,
        directory: Path,
        publish: Callable[[LocalCheckpoint], object],
        *,
        on_fenced: Callable[[Fenced], None],
        on_error: Callable[[Exception], None] | None = None,
        keep_local: int = 2,
        spool_limit_bytes: int = SPOOL_LIMIT_BYTES,
        rescan_s: float = 5.0,
    ) -> None:
        if keep_local < 1:
            raise ValueError(f"keep_local must be at least 1, got {keep_local}: the newest is never removed")
        self._directory = directory
        self._publish = publish
        self._on_fenced = on_fenced
        self._on_error = on_error or (lambda error: None)
        self._keep_local = keep_local
        self._spool_limit_bytes = spool_limit_bytes
        self._rescan_s = rescan_s
        self._published_step = 0
        self._unusable: set[int] = set()
        self._problem: str | None = None
        self._draining = False
        self._stopped = threading.Event()
        self._look_again = threading.Event()
        self._changed = threading.Condition()
        self._observer: BaseObserver | None = None
        self._deaf = False
        self._listening = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="replicator", daemon=True)

    def start(self) -> None:
        """Begin. What is in the directory already counts as new."""
        self._directory.mkdir(parents=True, exist_ok=True)
        self._listen()
        self._thread.start()

    @property
    def pending(self) -> LocalCheckpoint | None:
        """The checkpoint to publish next: the newest complete one, if it is not published."""
        for checkpoint in newest_first(self._directory):
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
            while not self._is_all_published():
                left_s = deadline - time.monotonic()
                if left_s <= 0 or self._stopped.is_set() or not self._thread.is_alive():
                    return False
                self._changed.wait(left_s)
        with contextlib.suppress(OSError):
            newest = next(newest_first(self._directory), None)
            return newest is None or newest.step <= self._published_step
        return False

    def _is_all_published(self) -> bool:
        """Whether nothing is pending. What cannot be looked at now may well be."""
        try:
            return self.pending is None
        except OSError:
            return False

    def stop(self) -> None:
        """End replication. An upload that is under way is left to finish or to die with the process."""
        self._end()
        with self._listening:
            self._stop_listening()

    def _listen(self) -> None:
        """Be told of new directories, unless that is so already: an observer's threads may have died.

        Never raises: looking every ``rescan_s`` is slower and loses nothing.
        """
        with self._listening:
            if self._stopped.is_set() or _is_alive(self._observer):
                return
            began_before = self._observer is not None
            try:
                self._stop_listening()
                self._observer = _observing(self._directory, _Hint(self._look_again))
            except Exception as error:  # out of watches, of files, of threads, or whatever the library meets
                if not self._deaf:
                    logger.warning(
                        "%s: no file events: %s; looking every %g s", self._directory, error, self._rescan_s
                    )
                self._deaf = True
                return
            if began_before:
                logger.warning("%s: file events had ended; they are watched again", self._directory)
            self._deaf = False

    def _stop_listening(self) -> None:
        observer, self._observer = self._observer, None
        if observer:
            observer.stop()
            if observer.is_alive():
                observer.join()

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # on Linux this is the thread's own, and of those it starts
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICENESS)
        try:
            self._replicate()
        finally:
            self._end()

    def _replicate(self) -> None:
        pause_s = FIRST_PAUSE_S
        while not self._stopped.is_set():
            self._look_again.clear()
            self._listen()
            if self._up_to_date():
                pause_s = FIRST_PAUSE_S
                self._look_again.wait(self._rescan_s)
            else:
                if self._draining:
                    pause_s = min(pause_s, LONGEST_PAUSE_DRAINING_S)
                self._pause(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(pause_s * 2, LONGEST_PAUSE_S)

    def _up_to_date(self) -> bool:
        """``_bring_up_to_date``, whatever happens: without this thread nothing more would be committed."""
        try:
            return self._bring_up_to_date()
        except Exception as error:
            self._tell(f"{type(error).__name__}: {error}")
            return False

    def _bring_up_to_date(self) -> bool:
        """Publish what is pending until nothing is. False if it has to be tried again later."""
        while not self._stopped.is_set():
            try:
                checkpoint = self.pending
                if checkpoint is None:
                    self._remove_superseded(limit_bytes=0)
                    return True
                self._publish_one(checkpoint)
            except Fenced as error:
                logger.warning("%s: replication ends: %s", self._directory, error)
                self._end()
                self._on_fenced(error)
            except Exception as error:
                # Whatever it was, the checkpoint is still there: trying again is the only way not to lose it.
                self._tell(f"{type(error).__name__}: {error}")
                with contextlib.suppress(OSError):  # out of files, for example: the next time will do
                    self._remove_superseded(limit_bytes=self._spool_limit_bytes)
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

    def _remove_superseded(self, *, limit_bytes: int) -> None:
        """Remove the oldest usable checkpoints that do not fit into the limit."""
        usable = [c for c in complete_checkpoints(self._directory) if c.step not in self._unusable]
        count = superfluous([size_of(c) for c in usable], keep=self._keep_local, limit_bytes=limit_bytes)
        for checkpoint in usable[len(usable) - count :]:
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


def _observing(directory: Path, handler: FileSystemEventHandler) -> BaseObserver:
    observer = Observer()
    try:
        observer.schedule(handler, str(directory))
        observer.start()
    except BaseException:
        observer.stop()
        raise
    return observer


def _is_alive(observer: BaseObserver | None) -> bool:
    return observer is not None and observer.is_alive() and all(e.is_alive() for e in observer.emitters)


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
