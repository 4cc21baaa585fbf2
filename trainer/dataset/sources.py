"""Where a data set is written to lie, made into a folder on this machine.

    photos, /srv/photos                 a folder, as it is
    hub://owner/name                    a data set on the hub, exported image by image: see ``hub``
    s3://bucket/prefix?endpoint=…       the objects under a prefix, downloaded: see ``bucket``

What is fetched goes into the node's content cache under a name that changes with the source: the commit, or
the names and ETags of all objects. That name only saves a second download; a run is pinned to the digest of
the folder's content, so nothing can change behind its back.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Protocol

from storage.content.cache import ContentCache, Wait
from storage.content.hashing import hashed
from storage.content.state import Listing
from storage.errors import InvalidName, StorageError, Unavailable

from ..config import Dataset
from ..errors import BadInput, BaseUnavailable
from .folder import dataset_digest, files_in

_FORMS = "dataset.path is a local folder, hub://owner/name, or s3://bucket/prefix?endpoint=…&region=…"


@dataclass(frozen=True, slots=True)
class Source:
    """What of a ``Dataset`` says where its files come from."""

    path: str
    revision: str | None
    split: str
    image_column: str
    caption_column: str

    @classmethod
    def of(cls, dataset: Dataset) -> "Source":
        return cls(
            dataset.path, dataset.revision, dataset.split, dataset.image_column, dataset.caption_column
        )

    @property
    def is_remote(self) -> bool:
        return "://" in self.path


@dataclass(frozen=True, slots=True)
class Pin:
    """What a remote source held when it was looked at."""

    digest: str
    """Of the folder that it becomes."""
    revision: str | None
    """Commit on the hub."""


class Remote(Protocol):
    """A source that has been looked at, but not fetched."""

    revision: str | None
    size_bytes: int
    """0: not known."""

    def identity(self) -> list[object]:
        """JSON values that change with the source's bytes."""

    def fetch(self, target: Path, alive: Callable[[], None]) -> None:
        """Write it as a folder into ``target``, where files of an earlier try may lie."""


@contextlib.contextmanager
def local_folder(
    dataset: Dataset,
    cache: Path,
    alive: Callable[[], None] = lambda: None,
    wait: Wait | None = None,
) -> Iterator[Path]:
    """Yield the folder with a data set's files; one that was fetched stays there within the block.

    Args:
        cache: What this machine can fetch again: see ``rundir.cache_folder``.
        alive: Called after each file that is fetched.
        wait: How to wait for another process that is fetching the same.

    Raises:
        BadInput: There is no such data set, or it may not be read.
        BaseUnavailable: It cannot be reached now, or there is no room for it.
    """

    def patient(seconds: float) -> bool:
        alive()
        return Event().wait(seconds)

    source = Source.of(dataset)
    if not source.is_remote:
        yield Path(dataset.path).expanduser()
        return
    with contextlib.ExitStack() as held:
        with _translated(dataset.path):
            remote = _open(source)
            yielded = held.enter_context(_kept(remote, cache / "content", alive, wait or patient))
        yield yielded


def pin(dataset: Dataset, cache: Path) -> Pin:
    """Look at a remote data set as it is now.

    Raises:
        BadInput, BaseUnavailable
    """
    with _translated(dataset.path):
        remote = _open(Source.of(dataset))
        with _kept(remote, cache / "content", lambda: None, Event().wait) as folder:
            return Pin(dataset_digest(folder, cache / "digests"), remote.revision)


def _open(source: Source) -> Remote:
    scheme = source.path.partition("://")[0].lower()
    if scheme == "hub":
        from .hub import HubDataset  # the libraries take long to import

        return HubDataset(source)
    if scheme == "s3":
        from .bucket import BucketPrefix

        return BucketPrefix(source.path)
    raise BadInput(f"dataset {scheme}://…: nothing is read from there", _FORMS)


@contextlib.contextmanager
def _kept(remote: Remote, cache: Path, alive: Callable[[], None], wait: Wait) -> Iterator[Path]:
    key = hashlib.sha256(json.dumps(remote.identity()).encode()).hexdigest()

    def fetch(target: Path) -> Listing:
        remote.fetch(target, alive)
        return hashed("", dict(files_in(target))).listing

    with ContentCache(cache).hold(key, remote.size_bytes, fetch, wait) as folder:
        yield folder


@contextlib.contextmanager
def _translated(path: str) -> Iterator[None]:
    try:
        yield
    except Unavailable as error:
        raise BaseUnavailable(f"dataset {path}: {error}", "try again, or give a local folder") from error
    except InvalidName as error:  # what was wrongly written into a url may be a secret
        raise BadInput(f"dataset: {error}".replace("store url", "url"), _FORMS) from error
    except StorageError as error:
        raise BadInput(f"dataset {path}: {error}", "give what can be read, or a local folder") from error
