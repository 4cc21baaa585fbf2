"""What takes how much room in a store, and how many requests it took to find out."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .. import layout
from ..errors import InvalidName
from ..object_store import ObjectInfo, ObjectStore
from ..run_state import RunState
from .inventory import Inventory, RunObjects
from .rules import orphans

_PAGE = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """One line: things of one kind."""

    sweep: str = ""
    run: str = ""
    kind: str
    digest: str = ""
    """Of shared content."""
    objects: int
    size_bytes: int


class Counted:
    """A store that counts the requests made to it, as a provider counts them: a listing has 1,000 a page."""

    def __init__(self, inner: ObjectStore) -> None:
        self._inner = inner
        self.requests = 0

    @property
    def url(self) -> str:
        return self._inner.url

    def put(self, key: str, body: bytes | Path) -> None:
        self.requests += 1
        self._inner.put(key, body)

    def create(self, key: str, body: bytes) -> bool:
        self.requests += 1
        return self._inner.create(key, body)

    def get(self, key: str) -> bytes:
        self.requests += 1
        return self._inner.get(key)

    def download(self, key: str, target: Path) -> None:
        self.requests += 1
        self._inner.download(key, target)

    def head(self, key: str) -> ObjectInfo | None:
        self.requests += 1
        return self._inner.head(key)

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        return self._paged(self._inner.list(prefix, after))

    def delete(self, keys: Iterable[str]) -> None:
        listed = tuple(keys)
        self.requests += len(listed)
        self._inner.delete(listed)

    def abort_uploads(self, prefix: str) -> int:
        count = self._inner.abort_uploads(prefix)
        self.requests += 1 + count
        return count

    def unfinished(self, prefix: str) -> Iterator[ObjectInfo]:
        return self._paged(self._inner.unfinished(prefix))

    def _paged(self, infos: Iterable[ObjectInfo]) -> Iterator[ObjectInfo]:
        self.requests += 1
        for number, info in enumerate(infos):
            if number and number % _PAGE == 0:
                self.requests += 1
            yield info


def usage(inventory: Inventory, states: Mapping[str, RunState], sweep_of: Mapping[str, str]) -> list[Usage]:
    """Return what takes room, biggest first.

    Args:
        states: By run; of a run that is missing here, nobody knows which of its checkpoints are alive.
        sweep_of: The sweep of each run that is of one.
    """
    found: list[Usage] = []

    def add(
        kind: str, infos: Iterable[ObjectInfo], *, sweep: str = "", run: str = "", digest: str = ""
    ) -> None:
        sizes = [info.size_bytes for info in infos]
        if sizes:
            line = Usage(
                sweep=sweep, run=run, kind=kind, digest=digest, objects=len(sizes), size_bytes=sum(sizes)
            )
            found.append(line)

    for run, objects in inventory.runs.items():
        sweep = sweep_of.get(run, "")
        for kind, infos in _checkpoints(run, objects, states.get(run)).items():
            add(kind, infos, sweep=sweep, run=run)
        add("records", [*objects.log.values(), *objects.rest], sweep=sweep, run=run)
        add("logs", objects.text, sweep=sweep, run=run)
        add("samples", objects.samples, sweep=sweep, run=run)
    for sweep, infos in inventory.sweeps.items():
        add("sweep", infos, sweep=sweep)
    for digest, content in inventory.contents.items():
        objects_of = [*content.log.values(), *(i for infos in content.data.values() for i in infos)]
        add("content", objects_of, digest=digest)
    add("probes", inventory.probes)
    add("unknown", inventory.unknown)
    return sorted(found, key=lambda line: (-line.size_bytes, line.sweep, line.run, line.kind, line.digest))


def _checkpoints(run: str, objects: RunObjects, state: RunState | None) -> dict[str, list[ObjectInfo]]:
    """A run's data by what became of the checkpoint that it is of."""
    if state is None:
        return {"unreadable": objects.data}
    kinds: dict[str, list[ObjectInfo]] = {}
    try:
        of = {
            layout.committed_file(run, c, file.name): kind
            for kind, checkpoints in (("retired", state.retired), ("checkpoints", state.stored))
            for c in checkpoints
            for file in c.files
        }
        lost = {info.key for info in orphans(run, state, objects.data)}
    except InvalidName:  # a record says what no key can
        return {"unreadable": objects.data}
    quarantined = {ref for ref, _ in state.quarantined}
    for info in objects.data:
        data = layout.parse_data(info.key)
        kind = of.get(info.key) or ("orphaned" if info.key in lost else "")
        if not kind:
            kind = "quarantined" if data and data.ref in quarantined else "uploading"
        kinds.setdefault(kind, []).append(info)
    return kinds
