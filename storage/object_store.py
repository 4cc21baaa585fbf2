"""The one interface to a place that keeps bytes under keys.

A key is a relative POSIX path built by ``layout``; each store resolves it under its own root. Stores
translate foreign errors into ``storage.errors`` and retry nothing that could change the meaning of an
answer: ``create`` is sent once, and its caller resolves a lost reply.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

FETCH_TRIES = 2
"""A file that arrives with the wrong digest is fetched again once: the network may be to blame."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a listing tells of one object."""

    key: str
    size_bytes: int
    modified_s: float | None = field(default=None, compare=False)
    """When it was written, in Unix seconds of the store's own clock; None if the store does not tell."""
    etag: str | None = field(default=None, compare=False)
    """What the store calls its bytes, see ``s3.etag``; None if it does not tell."""


class ObjectStore(Protocol):
    """Bytes under keys, with read-after-write and list-after-write consistency."""

    @property
    def url(self) -> str:
        """The store's url as a person wrote it, without secrets: used in messages."""

    def put(self, key: str, body: bytes | Path) -> None:
        """Write an object whole, replacing any other. A reader sees all of it or none of it.

        Raises:
            AccessDenied, Unavailable
        """

    def create(self, key: str, body: bytes) -> bool:
        """Write an object only if its key is free. True if this call wrote it, False if the key was taken.

        Raises:
            Unavailable: The outcome is unknown: read the key to learn it.
        """

    def get(self, key: str) -> bytes:
        """Read a small object whole.

        Raises:
            NotFound
        """

    def download(self, key: str, target: Path) -> None:
        """Stream an object into a file, which is left incomplete if this raises.

        Raises:
            NotFound
        """

    def head(self, key: str) -> ObjectInfo | None:
        """What is known of an object, or None if there is none."""

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        """Objects whose key starts with ``prefix`` and is greater than ``after``, in key order."""

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects. One that is not there counts as deleted."""

    def abort_uploads(self, prefix: str) -> int:
        """Delete what writers that died in a ``put`` have left under keys that start with ``prefix``.

        Also ends a ``put`` that is still under way. A store that cannot tell has nothing to abort.

        Returns:
            How many uploads that were.
        """

    def unfinished(self, prefix: str) -> Iterator[ObjectInfo]:
        """What ``abort_uploads`` would find: a line for each upload, without the size, which nobody tells."""
