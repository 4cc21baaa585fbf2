"""What tests of the supervisor give to attempts: claims of a run, and a store that fails."""

from collections.abc import Callable, Iterator
from pathlib import Path

from support.attempts import Attempt
from support.runs import RUN, claimed

from storage.log import run_log
from storage.memory import MemoryStore
from storage.object_store import ObjectInfo, ObjectStore
from trainer.config import Base, Dataset, RunSpec


def claim(store: ObjectStore, attempt: int) -> None:
    run_log(store, RUN).append(claimed(attempt))


Supervise = Callable[..., Attempt]
LIGHT_SPEC = RunSpec(base=Base(model="owner/model"), dataset=Dataset(path="/data"))


class Failing(MemoryStore):
    """Refuses calls of one kind with one error, at most so many times."""

    def __init__(self, call: str, error: Exception, times: int = 10**9) -> None:
        super().__init__()
        self._call, self._error, self.left = call, error, times
        self.armed = False

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        self._maybe("list")
        return super().list(prefix, after)

    def put(self, key: str, body: bytes | Path) -> None:
        if "/data/" in key:
            self._maybe("put")
        super().put(key, body)

    def download(self, key: str, target: Path) -> None:
        self._maybe("download")
        super().download(key, target)

    def _maybe(self, call: str) -> None:
        if self.armed and call == self._call and self.left > 0:
            self.left -= 1
            raise self._error
