"""Work on threads that die with the process.

The threads of a ``ThreadPoolExecutor`` are waited for when the interpreter exits, and a request to a store
that does not answer takes minutes to give up.
"""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")


def begin(name: str, call: Callable[P, T], *args: P.args, **options: P.kwargs) -> "Future[T]":
    """Start a call on a thread of its own. That there is no thread for it shows in the future, too."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call(*args, **options))
        except BaseException as error:
            future.set_exception(error)

    try:
        threading.Thread(target=run, name=name, daemon=True).start()
    except RuntimeError as error:
        future.set_exception(error)
    return future


def each(name: str, call: Callable[[S], T], items: Iterable[S], *, at_once: int) -> list[T]:
    """Call for every item, so many at a time; return the results in the items' order.

    Raises:
        Exception: What one of the calls raised, once the others are done.
    """
    todo, lock, results = enumerate(items), threading.Lock(), dict[int, T]()

    def work() -> None:
        while True:
            with lock:
                number, item = next(todo, (None, None))
            if number is None:
                return
            results[number] = call(item)  # type: ignore[arg-type]

    working = [begin(name, work) for _ in range(at_once)]
    wait(working)
    for one in working:
        one.result()
    return [results[number] for number in sorted(results)]
