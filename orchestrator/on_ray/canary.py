"""Whether a node can train at all, asked before it gets a run: room on its disk and in its memory, its clock,
the store and the way to it.

``unfit`` is the rule, ``Canary`` asks in the background and again while the answer is bad. Its GPU is tried
by the warm process (``spare``).
"""

import contextlib
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from storage import layout
from storage.doctor.checks import judged_skew
from storage.errors import AccessDenied, Corrupt, StorageError
from storage.object_store import ObjectStore
from trainer.memory.host import free_bytes
from trainer.patience import one_line

from ..control.cluster import StoreSpeed

LOOKING = "it is being looked at"
"""Not known to be fit yet, so not fit."""
LEAST_FREE_BYTES = 100_000_000
"""For logs, samples and a small adapter."""
LEAST_FREE_MEMORY_BYTES = 500_000_000
"""A training process takes about as much before it has loaded any model."""
CHECKPOINTS = 2
"""So many must fit: one is written while the one before is sent."""
PROBE_BYTES = 256 << 10
"""What is sent to the store and back to see how fast that is."""
LEAST_S = 0.001
"""What sending it takes at least, so that the speed of a store in memory is a number."""
LONGEST_UPLOAD_S = 1800.0
"""A node is too far from the store if the sweep's largest checkpoint would take longer. Slow links are borne
otherwise, with a checkpoint less often: such a node still trains, one without a run does not."""
FIRST_PAUSE_S = 15.0
LONGEST_PAUSE_S = 240.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What was seen of a node."""

    disk_free_bytes: int | None = None
    problem: str = ""
    """Why the store, or the disk, cannot be used at all."""
    clock_ahead_s: float | None = None
    """Against the store's clock; None where that tells none."""
    memory_free_bytes: int | None = None
    speed: StoreSpeed | None = None
    """None where it could not be tried."""


def unfit(sight: Sight, checkpoint_bytes: int) -> str:
    """Return why a node is not fit to train, or "".

    Args:
        checkpoint_bytes: The largest that the sweep has made so far.
    """
    if sight.clock_ahead_s is not None:
        skew = judged_skew(sight.clock_ahead_s)
        if skew.ok is False:  # then the store refuses everything, and says less clearly why
            return f"{skew.said}: {skew.todo}"
    if sight.problem:
        return sight.problem
    needed = max(LEAST_FREE_BYTES, CHECKPOINTS * checkpoint_bytes)
    if sight.disk_free_bytes is not None and sight.disk_free_bytes < needed:
        return (
            f"its disk has room for {sight.disk_free_bytes / 1e9:.2f} GB, and {CHECKPOINTS} checkpoints take "
            f"{needed / 1e9:.2f}: make room, or point TMPDIR to a larger one"
        )
    memory = sight.memory_free_bytes
    if memory is not None and memory < LEAST_FREE_MEMORY_BYTES:
        return (
            f"its memory has room for {memory / 1e9:.2f} GB, and a trainer takes "
            f"{LEAST_FREE_MEMORY_BYTES / 1e9:.2f} before it has loaded a model: end what else runs there, or "
            "give the container more"
        )
    if sight.speed and checkpoint_bytes > sight.speed.up * LONGEST_UPLOAD_S:
        minutes = checkpoint_bytes / sight.speed.up / 60
        return (
            f"a checkpoint of {checkpoint_bytes / 1e6:.0f} MB would take {minutes:.0f} min to the store, at "
            f"{sight.speed.up / 1e6:.3f} MB/s: use a store that is nearer, or another node"
        )
    return ""


def look(store: ObjectStore | None, sweep: str, scratch: Path) -> Sight:
    """Look at this node; never raises.

    Args:
        store: None for an agent that has no keys: its first request for a grant will tell.
    """
    try:
        free = shutil.disk_usage(scratch).free
    except OSError as error:
        return Sight(problem=f"its disk cannot be used: {error}")
    memory = free_bytes(os.getpid())
    ahead_s: float | None = None
    speed: StoreSpeed | None = None
    problem = ""
    if store is not None:
        try:
            ahead_s = _clock_ahead_s(store)
            start = time.perf_counter()
            if store.head(layout.sweep_spec(sweep)) is None:
                problem = f"it sees no sweep {sweep} in {store.url}: is that the same store on this node?"
            else:
                speed = _speed(store, a_request_s=time.perf_counter() - start)
        except (StorageError, OSError) as error:
            problem = f"it cannot use the store: {one_line(f'{type(error).__name__}: {error}')}"
    return Sight(
        disk_free_bytes=free,
        memory_free_bytes=memory,
        problem=problem,
        clock_ahead_s=ahead_s,
        speed=speed,
    )


def _speed(store: ObjectStore, a_request_s: float) -> StoreSpeed | None:
    """Send something there and back; None if these credentials may not.

    What a process that dies in here leaves, ``gc`` deletes.

    Args:
        a_request_s: What a request takes that moves nothing. It is not counted: a checkpoint takes few.

    Raises:
        StorageError
    """
    key, body = layout.probe_file(uuid.uuid4(), "speed"), os.urandom(PROBE_BYTES)
    try:
        start = time.perf_counter()
        store.put(key, body)
        sent = time.perf_counter()
        arrived = store.get(key)
        received = time.perf_counter()
    except AccessDenied:  # as of keys that are good for this sweep's runs alone: those will tell
        return None
    finally:
        with contextlib.suppress(StorageError):
            store.delete([key])
    if arrived != body:
        raise Corrupt(f"{key} in {store.url}: read back other bytes than were written")
    return StoreSpeed(
        up=PROBE_BYTES / max(sent - start - a_request_s, LEAST_S),
        down=PROBE_BYTES / max(received - sent - a_request_s, LEAST_S),
    )


def _clock_ahead_s(store: ObjectStore) -> float | None:
    server_time = getattr(store, "server_time", None)  # a bucket's; a folder has no clock of its own
    if server_time is None:
        return None
    before = time.time()
    told = server_time()
    return None if told is None else float((before + time.time()) / 2 - told.timestamp() - 0.5)


class Canary:
    """Looks at this node once started, and again while it is unfit or when asked to.

    Args:
        ask: Says why the node is unfit, or "".
        on_change: Called from another thread after ``problem`` has changed.
    """

    def __init__(
        self, ask: Callable[[], str], on_change: Callable[[], None], *, pause_s: float = FIRST_PAUSE_S
    ) -> None:
        self.problem = LOOKING
        self._ask = ask
        self._on_change = on_change
        self._first_pause_s = pause_s
        self._again = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._run, name="canary", daemon=True).start()

    def again(self) -> None:
        """Look once more: something went wrong on this node."""
        self._again.set()

    def _run(self) -> None:
        pause_s = self._first_pause_s
        while True:
            self._again.clear()
            try:
                problem = self._ask()
            except Exception:  # a check that breaks says nothing about the node
                logger.exception("the node could not be checked")
                problem = ""
            if problem != self.problem:
                self.problem = problem
                self._on_change()
            self._again.wait(pause_s if problem else None)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S) if problem else self._first_pause_s
