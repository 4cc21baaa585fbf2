"""Asks for notices every two seconds, on a thread of its own, and passes on what changes."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from .metadata import Unreachable
from .notice import Notice, Standing, after, told
from .sources import Source

POLL_S = 2.0
PATIENCE = 5
"""So many failures in a row are said, once, and from then on it is asked less and less often."""
LONGEST_POLL_S = 60.0

logger = logging.getLogger(__name__)


class NoticeWatcher:
    """Knows what this node was told last. ``look`` is called by one thread, ``notice`` by any.

    Args:
        source: None: nobody ever tells anything.
        on_change: Called, on the watcher's thread, when a notice appears, changes its kind, is withdrawn,
            told again, or over.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        source: Source | None,
        on_change: Callable[[Notice | None], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._on_change = on_change
        self._clock = clock
        self._standing = Standing()
        self._failures = 0

    @property
    def notice(self) -> Notice | None:
        """The notice that counts at this moment."""
        return told(self._standing, self._clock())

    def start(self) -> None:
        if self._source:
            threading.Thread(target=self._watch, name="notices", daemon=True).start()

    def look(self) -> float:
        """Ask once; returns the seconds after which to ask again."""
        if self._source is None:
            return LONGEST_POLL_S
        before = self._essence()
        try:
            polled = self._source.poll()
        except Unreachable as error:  # what stands, stands: silence withdraws nothing
            self._failed(str(error))
        except Exception as error:  # one odd answer must not end the asking
            self._failed(f"{type(error).__name__}: {error}")
        else:
            if self._failures >= PATIENCE:
                logger.info("notices can be asked for again")
            self._failures = 0
            self._standing = after(self._standing, polled, self._clock())
        if (now := self._essence()) != before:
            logger.warning("%s", self._words())
            self._on_change(self.notice if now else None)
        return min(POLL_S * 2.0 ** max(0, min(self._failures - PATIENCE, 64)), LONGEST_POLL_S)

    def _watch(self) -> None:
        while True:
            time.sleep(self.look())

    def _failed(self, why: str) -> None:
        self._failures += 1
        if self._failures == PATIENCE:
            logger.info("notices cannot be asked for; trying on, less often: %s", why)

    def _essence(self) -> Notice | None:
        """The notice without what merely passes."""
        notice = self.notice
        return replace(notice, left_s=None, detail="") if notice else None

    def _words(self) -> str:
        notice = self.notice
        if notice is None:
            return "the notice is over: this node is used again"
        detail = f" ({notice.detail})" if notice.detail else ""
        return f"{notice}{detail}{' was withdrawn; waiting for calm' if notice.withdrawn else ''}"
