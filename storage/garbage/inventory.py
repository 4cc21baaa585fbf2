"""All that lies in a store, from one listing: whose it is and what kind of thing. Pure, but for ``take``.

What no key of ``layout`` explains is counted and never touched: somebody else may have put it there.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain

from .. import layout
from ..errors import AccessDenied
from ..object_store import ObjectInfo, ObjectStore

_PROBE_KEY = re.compile(
    r"probe/(?:(?:doctor-)?[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}/.+|[0-9a-f]{16}/granted)",
    re.ASCII | re.DOTALL,
)
"""What ``probe``, ``doctor`` and the grant desk's check write, and no key that a person would choose."""
SWEEPS_PREFIX = "sweeps/"


@dataclass(slots=True)
class RunObjects:
    """What a run has in the store."""

    log: dict[int, ObjectInfo] = field(default_factory=dict)
    """By position."""
    data: list[ObjectInfo] = field(default_factory=list)
    """Checkpoints' files, whatever became of the checkpoints."""
    text: list[ObjectInfo] = field(default_factory=list)
    """Batches of events and of the trainers' output."""
    samples: list[ObjectInfo] = field(default_factory=list)
    rest: list[ObjectInfo] = field(default_factory=list)
    """The spec, and whatever newer versions may keep there."""
    unfinished: list[ObjectInfo] = field(default_factory=list)
    """Uploads in parts that nobody completed (yet)."""


@dataclass(slots=True)
class ContentObjects:
    """What a content has in the store."""

    log: dict[int, ObjectInfo] = field(default_factory=dict)
    data: dict[str, list[ObjectInfo]] = field(default_factory=dict)
    """By incarnation."""


@dataclass(slots=True)
class Inventory:
    """One listing of a store, sorted out."""

    runs: dict[str, RunObjects] = field(default_factory=dict)
    sweeps: dict[str, list[ObjectInfo]] = field(default_factory=dict)
    """By sweep: its spec and what its controllers keep there."""
    contents: dict[str, ContentObjects] = field(default_factory=dict)
    probes: list[ObjectInfo] = field(default_factory=list)
    unknown: list[ObjectInfo] = field(default_factory=list)
    stray_uploads: list[ObjectInfo] = field(default_factory=list)
    """Unfinished uploads of no run. Those under keys of somebody else's are not among them."""
    uploads_hidden: str = ""
    """Why the unfinished uploads could not be listed."""

    @property
    def newest_s(self) -> float | None:
        """A moment that the store's clock has passed: the latest at which it wrote anything."""
        infos = [*self.probes, *self.unknown, *chain.from_iterable(self.sweeps.values())]
        for run in self.runs.values():
            infos += [*run.log.values(), *run.data, *run.text, *run.samples, *run.rest]
        for content in self.contents.values():
            infos += [*content.log.values(), *chain.from_iterable(content.data.values())]
        return max((info.modified_s for info in infos if info.modified_s is not None), default=None)


def take(store: ObjectStore) -> Inventory:
    """List everything once.

    Raises:
        AccessDenied, Unavailable
    """
    hidden, unfinished = "", []
    try:
        unfinished = list(store.unfinished(""))
    except AccessDenied as error:  # a right of its own, which few policies grant
        hidden = str(error)
    inventory = sort_out(store.list(""), unfinished)
    inventory.uploads_hidden = hidden
    return inventory


def sort_out(listing: Iterable[ObjectInfo], unfinished: Iterable[ObjectInfo] = ()) -> Inventory:
    """Say of each object and each unfinished upload whose it is."""
    inventory = Inventory()
    for info in listing:
        _place(inventory, info)
    for upload in unfinished:
        data = layout.parse_data(upload.key)
        if data:
            inventory.runs.setdefault(data.run, RunObjects()).unfinished.append(upload)
        elif _is_ours(upload.key):
            inventory.stray_uploads.append(upload)
    return inventory


def sweeps_in(store: ObjectStore) -> frozenset[str]:
    """The names of the sweeps that exist now."""
    specs = (layout.parse_spec(info.key) for info in store.list(SWEEPS_PREFIX))
    return frozenset(spec[1] for spec in specs if spec)


def size_of(infos: Iterable[ObjectInfo]) -> int:
    return sum(info.size_bytes for info in infos)


def _is_ours(key: str) -> bool:
    """Whether one of the few things that are sent in parts, beside checkpoints, has this key."""
    return bool(_PROBE_KEY.fullmatch(key) or layout.parse_content(key) or layout.parse_sample(key))


def _place(inventory: Inventory, info: ObjectInfo) -> None:
    top, _, rest = info.key.partition("/")
    name = rest.partition("/")[0]
    if _PROBE_KEY.fullmatch(info.key):
        inventory.probes.append(info)
    elif top == "runs" and layout.is_name(name):
        _place_of_run(inventory.runs.setdefault(name, RunObjects()), name, info)
    elif top == "sweeps" and layout.is_name(name):
        inventory.sweeps.setdefault(name, []).append(info)
    elif parsed := layout.parse_content(info.key):
        digest, incarnation = parsed
        content = inventory.contents.setdefault(digest, ContentObjects())
        position = layout.parse_log_entry(layout.content_log_prefix(digest), info.key)
        if incarnation is not None:
            content.data.setdefault(incarnation, []).append(info)
        elif position is not None:
            content.log[position] = info
    else:
        inventory.unknown.append(info)


def _place_of_run(run: RunObjects, name: str, info: ObjectInfo) -> None:
    position = layout.parse_log_entry(layout.run_log_prefix(name), info.key)
    if position is not None:
        run.log[position] = info
    elif layout.parse_data(info.key):
        run.data.append(info)
    elif layout.parse_batch(info.key):
        run.text.append(info)
    elif layout.parse_sample(info.key):
        run.samples.append(info)
    else:
        run.rest.append(info)


def written_s(log: Mapping[int, ObjectInfo], position: int) -> float | None:
    """When the store wrote an entry of a log, by its own clock; None if it does not tell."""
    info = log.get(position)
    return info.modified_s if info else None
