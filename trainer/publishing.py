"""Brings an attempt's checkpoints to the store, and counts what that takes.

When the attempt is to end before a checkpoint can be there, by what the uploads so far took, its adapter is
committed first: the *salvage*, good to export. The whole checkpoint is tried all the same, for as long as
there is time; what was sent for the salvage is part of it and not sent again.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from storage.checkpoints import CheckpointStore
from storage.errors import StorageError
from storage.local import LocalCheckpoint, size_of

from .rundir import SALVAGE

MARGIN_S = 2.0
"""What a commit takes besides its bytes, and what an estimate may be wrong by."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One checkpoint that reached the store whole."""

    step: int
    state_bytes: int
    sent_bytes: int
    """What was sent since the checkpoint before: less than the state where it was packed, and more where the
    network made it be sent again."""
    seconds: float


class Publisher:
    """Publishes one attempt's checkpoints.

    Args:
        left_s: Seconds until the attempt is killed; None while nobody has asked it to stop.
    """

    def __init__(
        self,
        checkpoints: CheckpointStore,
        attempt: int,
        incarnation: str,
        *,
        left_s: Callable[[], float | None],
    ) -> None:
        self._checkpoints = checkpoints
        self._attempt = attempt
        self._incarnation = incarnation
        self._left_s = left_s
        self._salvaging = threading.Lock()
        self._salvaged_step = 0
        self._at_step: int | None = None
        self._counted_bytes = 0

    def publish(self, local: LocalCheckpoint) -> Published:
        """Commit a checkpoint whole, having salvaged its adapter if there may be no time for the whole.

        Raises:
            StorageError: See ``CheckpointStore.publish``.
        """
        self._at_step = local.step
        try:
            began = time.monotonic()
            self.salvage(local)
            self._checkpoints.publish(local, self._attempt, self._incarnation)
            sent = self._checkpoints.sent_bytes
            sent_bytes, self._counted_bytes = sent - self._counted_bytes, sent
            return Published(
                step=local.step,
                state_bytes=size_of(local),
                sent_bytes=sent_bytes,
                seconds=time.monotonic() - began,
            )
        finally:
            self._at_step = None

    def is_held_up(self, local: LocalCheckpoint) -> bool:
        """Whether a checkpoint has to wait for an older one, which is being sent."""
        at_step = self._at_step
        return at_step is not None and at_step < local.step

    def salvage(self, local: LocalCheckpoint) -> None:
        """Commit a checkpoint's adapter if the whole will not be in the store in time; never raises for that.

        Not before an upload was measured: what is not known to be slow is not slow.
        """
        with self._salvaging:
            self._salvage(local)

    def salvage_beside(self, local: LocalCheckpoint) -> None:
        """``salvage``, for another thread, unless ``publish`` has come to this checkpoint meanwhile.

        What ``publish`` sends then is the whole, and two threads must not send the same files.
        """
        with self._salvaging:
            if self.is_held_up(local):
                self._salvage(local)

    def _salvage(self, local: LocalCheckpoint) -> None:
        names = SALVAGE & {file.name for file in local.manifest.files}
        left_s = self._left_s()
        if left_s is None or local.step <= self._salvaged_step or local.final:
            return
        if not names or len(names) == len(local.manifest.files):
            return
        whole_s = self._checkpoints.upload_s(local, self._attempt, self._incarnation)
        if whole_s is None or whole_s + MARGIN_S <= left_s:
            return
        logger.warning(
            "step %d: %.0f s to send, %.0f s left: the adapter goes first", local.step, whole_s, left_s
        )
        try:
            self._checkpoints.publish(local, self._attempt, self._incarnation, only=names)
            self._salvaged_step = local.step
        except StorageError as error:
            logger.warning("step %d: the adapter is not salvaged: %s", local.step, error)
