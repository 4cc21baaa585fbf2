"""Asks for notices every two seconds, on a thread of its own, and passes on what changes.

Who has told notices before, or is named by the sweep or by the machine itself, is asked as often when he does
not answer: a notice may leave only 30 s. Only where nobody was ever found, the search becomes less frequent.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from trainer.patience import one_line

from .metadata import NobodyHere, Unreachable
from .notice import Notice, Standing, after, told
from .sources import Source

POLL_S = 2.0
PATIENCE = 5
"""After so many searches in vain it is searched less and less often."""
LONGEST_POLL_S = 60.0

UNHEARD_S = 150.0
"""A silence of this length is said: Azure takes two minutes for its first answer to a machine."""

SOONER_S = 2.0
"""An end that is brought forward by more than this is passed on: a clock in whole seconds wavers by one."""

logger = logging.getLogger(__name__)

_Essence = tuple[Notice | None, bool, str]
"""The notice without what merely passes, whether it is for soon, and why none can be heard."""


class NoticeWatcher:
    """Knows what this node was told last. ``look`` is called by one thread, ``notice`` by any.

    Args:
        source: None: nobody ever tells anything.
        on_change: Called, on the watcher's thread, when a notice appears, changes its kind, is brought
            forward, comes to be ``soon``, is withdrawn, told again, or over, and when ``unheard`` changes.
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
        self._unheard = ""
        self._silent_since: float | None = None
        self._vain = 0
        """Searches in vain, in a row."""
        self._passed_on: _Essence = (None, False, "")
        self._ends_at: float | None = None
        """As it was passed on."""

    @property
    def unheard(self) -> str:
        """Why what is announced cannot be heard, and that for a while; empty: it can, or nobody is here."""
        return self._unheard

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
        self._ask(self._source)
        essence, ends_at = self._essence(), self._standing.ends_at
        if essence != self._passed_on or _sooner(ends_at, self._ends_at):
            if essence[:2] != self._passed_on[:2] or ends_at != self._ends_at:
                logger.warning("%s", self._words())
            self._passed_on, self._ends_at = essence, ends_at
            self._on_change(self.notice)
        return min(POLL_S * 2.0 ** max(0, min(self._vain - PATIENCE, 64)), LONGEST_POLL_S)

    def _ask(self, source: Source) -> None:
        try:
            polled = source.poll()
        except NobodyHere as error:
            self._vain += 1
            if self._vain == PATIENCE:
                logger.info("nobody tells notices here; searching on, less often: %s", error)
        except Unreachable as error:  # what stands, stands: silence withdraws nothing
            self._failed(str(error))
        except Exception as error:  # one odd answer must not end the asking
            self._failed(f"{type(error).__name__}: {error}")
        else:
            if self._unheard:
                logger.warning("notices can be heard again")
            self._vain, self._silent_since, self._unheard = 0, None, ""
            self._standing = after(self._standing, polled, self._clock())

    def _watch(self) -> None:
        while True:
            time.sleep(self.look())

    def _failed(self, why: str) -> None:
        now = self._clock()
        self._vain = 0
        if self._silent_since is None:
            self._silent_since = now
        if not self._unheard and now - self._silent_since >= UNHEARD_S:
            self._unheard = one_line(why)
            logger.warning("notices of this node's end cannot be heard: %s", self._unheard)

    def _essence(self) -> _Essence:
        notice = self.notice
        if notice is None:
            return None, False, self._unheard
        return replace(notice, left_s=None, detail=""), notice.soon, self._unheard

    def _words(self) -> str:
        notice = self.notice
        if notice is None:
            return "the notice is over: this node is used again"
        detail = f" ({notice.detail})" if notice.detail else ""
        if notice.withdrawn:
            return f"{notice}{detail} was withdrawn; waiting for calm"
        left_s, warning_s = notice.left_s, notice.warning_s
        nearer = left_s is not None and (warning_s is None or left_s < warning_s - SOONER_S)
        return f"{notice}{detail}{f', {left_s:.0f} s are left' if nearer else ''}"


def _sooner(ends_at: float | None, known: float | None) -> bool:
    return ends_at is not None and (known is None or ends_at < known - SOONER_S)
