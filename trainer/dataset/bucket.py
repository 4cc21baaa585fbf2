"""A data set under a prefix of a bucket, as ``storage`` reads buckets. Credentials are the environment's."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from storage import layout
from storage.errors import Unavailable
from storage.object_store import ObjectInfo, ObjectStore
from storage.url import open_store

from ..errors import BadInput
from .folder import is_part
from .images import is_image

_TOGETHER = 8
"""Downloads at a time."""


class BucketPrefix:
    """See ``sources.Remote``. Its listing is read when it is made."""

    revision: str | None = None

    def __init__(self, url: str) -> None:
        """
        Raises:
            BadInput: There is no image, or an object whose name cannot be that of a file.
            StorageError
        """
        self._store: ObjectStore = open_store(url)
        self._objects = self._listed()
        if not any(is_image(found.key) for found in self._objects):
            raise BadInput(
                f"dataset {url}: no PNG, JPEG or WebP image under this prefix",
                "s3://bucket/prefix?endpoint=…&region=…, where images and captions lie as in a folder",
            )
        for found in self._objects:
            layout.check_path(found.key, "object")
        self.size_bytes = sum(found.size_bytes for found in self._objects)

    def identity(self) -> list[object]:
        return ["s3", self._store.url, _facts(self._objects)]

    def fetch(self, target: Path, alive: Callable[[], None]) -> None:
        for folder in {PurePosixPath(found.key).parent for found in self._objects}:
            (target / folder).mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(_TOGETHER) as pool:
            for _ in pool.map(lambda found: self._fetch(found, target), self._objects):
                alive()
        if _facts(self._listed()) != _facts(self._objects):
            raise Unavailable("its objects changed while they were downloaded")

    def _fetch(self, found: ObjectInfo, target: Path) -> None:
        path = target / found.key
        if path.is_file():  # whole: it got its name by rename
            return
        unfinished = path.with_name(f".{path.name}.part")
        self._store.download(found.key, unfinished)
        if unfinished.stat().st_size != found.size_bytes:
            raise Unavailable(f"{found.key} has another size than its listing says")
        unfinished.replace(path)

    def _listed(self) -> list[ObjectInfo]:
        return [found for found in self._store.list("") if is_part(found.key)]


def _facts(objects: list[ObjectInfo]) -> list[list[object]]:
    return [[found.key, found.size_bytes, found.etag, found.modified_s] for found in objects]
