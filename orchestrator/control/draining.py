"""Asking a sweep to leave a node alone: through its controller where there is one, else by its log of drains.

The log is create-only and belongs to the sweep, so that a drain outlives every controller.
"""

import logging
import time
from collections.abc import Callable

from storage import layout
from storage.drains import (
    DRAIN_ENTRY,
    DrainAsked,
    DrainLifted,
    DrainRecord,
    Drains,
    fold,
    holds,
    refusal,
)
from storage.errors import Corrupt, StorageError
from storage.log import Log
from storage.object_store import ObjectStore

from ..errors import OrchestrateError
from ..usual_store import store_flag
from .cluster import RemoteController
from .readers import Readers

READ_EVERY_S = 30.0
RETRY_S = 2.0
_NAME = "/drains"
"""Among the readers' names, which are otherwise those of runs."""

logger = logging.getLogger(__name__)

DrainLog = Log[Drains, DrainRecord]


def drain_log(store: ObjectStore, sweep: str, *, pauses_s: tuple[float, ...] | None = None) -> DrainLog:
    """The log of a sweep's drains. Nothing is read before the first ``refresh`` or ``append``."""
    return Log(
        store,
        layout.drains_prefix(sweep),
        entry=DRAIN_ENTRY,
        initial=Drains(),
        fold=fold,
        refusal=refusal,
        holds=holds,
        pauses_s=pauses_s,
        readers=1,
    )


def ask_to_drain(
    store: ObjectStore,
    sweep: str,
    node: str,
    grace_s: float | None,
    controller: RemoteController | None,
    *,
    atomic: bool,
) -> None:
    """Ask a sweep to leave a node alone.

    Args:
        grace_s: Seconds in which what trains there saves itself and ends; None: the node may be used again.

    Raises:
        OrchestrateError: Only the controller may write to this store (not ``atomic``), and none is here.
        StorageError
    """
    if controller is not None:
        controller.drain(node, grace_s)
        return
    if not atomic:
        raise OrchestrateError(
            f"{store.url}: two writers could both win here, so only the controller may drain — "
            "give its cluster's --address, or start one with: "
            f"orchestrate resume {sweep}{store_flag(store.url)}"
        )
    drain_log(store, sweep).append(drain_record(node, grace_s, time.time()))


def drain_record(node: str, grace_s: float | None, at: float) -> DrainRecord:
    """Return what is to be recorded; no ``grace_s``: the drain is lifted."""
    if grace_s is None:
        return DrainLifted(node=node, at=at)
    return DrainAsked(node=node, grace_s=grace_s, at=at)


class DrainBook:
    """What a controller knows of its sweep's drains.

    Read in the background, so that a store that does not answer holds up nothing but new placements, and
    those only before the first answer: until then any node may be one that is drained.
    """

    def __init__(
        self, store: ObjectStore, sweep: str, readers: Readers, monotonic: Callable[[], float]
    ) -> None:
        self._log = drain_log(store, sweep, pauses_s=(0.1,))
        self._readers = readers
        self._monotonic = monotonic
        self._read_at = float("-inf")
        self._problem: str | None = None
        self.known = False
        """The log was read once, or is damaged: then what could be read of it counts."""

    def of(self, node: str) -> DrainAsked | None:
        """The drain that holds on a node."""
        return self._log.state.of(node)

    @property
    def state(self) -> Drains:
        return self._log.state

    def record(self, record: DrainRecord) -> None:
        """Append what an operator wants.

        Raises:
            StorageError
        """
        self._log.refresh()
        self._log.append(record)

    def tend(self, now: float) -> None:
        """Read the log again when it is due: where no controller is reached, commands write into it."""
        every_s = READ_EVERY_S if self.known else RETRY_S
        if now - self._read_at >= every_s and not self._readers.busy(_NAME):
            self._read_at = now
            self._readers.do({_NAME: self._read})

    def _read(self) -> None:
        try:
            self._log.refresh()
            problem = None
        except StorageError as error:
            problem = f"{type(error).__name__}: {error}"
            if problem != self._problem:
                logger.warning("drains: %s; going on with what is known", problem)
            self.known = self.known or isinstance(error, Corrupt)
        else:
            self.known = True
        self._problem = problem
