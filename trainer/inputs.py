"""Where this node has what a run is trained from: the path as it was written, or a copy of the content.

A path that exists here with the right digest is used as it is. Otherwise the content is fetched from the
store into the node's cache, and stays there while the attempt lives. What is neither here nor there is left
to the training process, which says so in the user's words. Imports no torch.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event

from storage.content.cache import ContentCache
from storage.content.state import Listing, Stored
from storage.content.store import content_log, fetch
from storage.object_store import ObjectStore

from .config import RunSpec
from .patience import patiently
from .rundir import Options, cache_folder
from .spec_inputs import Input, inputs_of

Find = Callable[[str], Stored | None]
"""Returns where in the store the content of a digest lies, if it does."""


@contextlib.contextmanager
def with_inputs(
    store: ObjectStore, spec: RunSpec, options: Options, stopping: Event, find: Find | None = None
) -> Iterator[Options]:
    """Yield the options with the places of the contents that had to be fetched, which stay until the end.

    Args:
        find: By default, what the content's log in the store says.

    Raises:
        Corrupt: The store's bytes are not what the spec was pinned to, also when fetched again.
        Unavailable, AccessDenied, NotFound
    """
    folder = cache_folder(options)
    cache = ContentCache(folder / "content")
    look = find or (lambda digest: content_log(store, digest).refresh().readable)
    places: dict[str, str] = {}
    with contextlib.ExitStack() as held:
        for digest in missing(spec, folder / "digests"):
            stored = patiently(lambda digest=digest: look(digest), stopping)  # type: ignore[misc]
            if stored is None:
                continue
            place = patiently(
                lambda digest=digest, stored=stored: held.enter_context(  # type: ignore[misc]
                    cache.hold(
                        digest, stored.size_bytes, _fetching(store, digest, stored, stopping), stopping.wait
                    )
                ),
                stopping,
            )
            places[digest] = str(place)
        yield options.model_copy(update={"content": places})


def missing(spec: RunSpec, memory: Path) -> list[str]:
    """Return the digests of the run's inputs that are not at their paths on this node."""
    found = [named for named in inputs_of(spec) if named.digest and not _is_right(named, memory)]
    return list(dict.fromkeys(named.digest for named in found if named.digest))


def _is_right(named: Input, memory: Path) -> bool:
    try:
        return named.is_here and named.content(Path(named.path).expanduser(), memory).digest == named.digest
    except (OSError, ValueError):
        return False


def _fetching(store: ObjectStore, digest: str, stored: Stored, stopping: Event) -> Callable[[Path], Listing]:
    return lambda target: fetch(store, digest, stored, target, stopping.is_set)
