"""Threads that wait for the store, so that the one that decides need not.

Work is named by what it is about, and what is still busy is not begun again. Whoever hands out work waits
while some of it still gets done; what hangs goes on alone, and holds up nobody but itself.
"""

import queue
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor

THREADS = 16
"""At most so many requests of a controller are on their way at once, and so many may hang before all wait."""

PATIENCE_S = 2.0
"""How long the deciding thread waits without anything getting done."""


class Readers:
    """Used by one thread. Threads are started when there is work, and end with this object."""

    threads = THREADS

    def __init__(self) -> None:
        self._pool = self.pool()
        self._busy: dict[str, Future[None]] = {}

    def pool(self) -> Executor:
        """Threads for whoever may not wait for what is busy here."""
        return ThreadPoolExecutor(self.threads, thread_name_prefix="reader")

    def busy(self, name: str) -> bool:
        """Whether work of this name has not ended, or how it ended has not been looked at."""
        return name in self._busy

    def begin(self, name: str, work: Callable[[], None]) -> None:
        """Do this while the caller goes on; nothing if that name is busy."""
        if name not in self._busy:
            self._busy[name] = self._pool.submit(work)

    def do(self, works: Mapping[str, Callable[[], None]], patience_s: float | None = PATIENCE_S) -> set[str]:
        """Do these at once, and return the names of those that are done.

        Waits until all are, or until none has ended for ``patience_s``; None: until all are. Names that are
        busy are left out.

        Raises:
            What one of them raised, or something that was begun earlier.
        """
        ended: queue.SimpleQueue[str] = queue.SimpleQueue()
        begun = [name for name in works if name not in self._busy]
        for name in begun:
            self.begin(name, works[name])
            self._busy[name].add_done_callback(lambda _, name=name: ended.put(name))  # type: ignore[misc]
        done: set[str] = set()
        try:
            while len(done) < len(begun):
                done.add(ended.get(timeout=patience_s))
        except queue.Empty:
            pass
        self.collect()
        return done

    def collect(self) -> None:
        """Free the names of what has ended, and raise what it raised."""
        ended = [(name, work) for name, work in self._busy.items() if work.done()]
        for name, _ in ended:
            del self._busy[name]
        for _, work in ended:
            work.result()
