"""The records of shared content, and what they mean: pure, like ``run_state``.

*Content* is a dataset or a base model, named by the digest of its bytes and shared by every sweep of a store.
An *incarnation* is one upload of it, under its own random prefix.

    state = reduce(fold, entries, ContentState())

    stored(A) ──► used(cat) ──► used(dog) ──► retired(A) ──► reaped(A) ──► stored(B) ──► …

The data of an incarnation is complete exactly when ``stored`` says so, and is deleted only after ``retired``
says so; a retired incarnation is never stored again. So a position of the log, which has one winner, decides
every race: a submission that comes after ``retired`` sees it and uploads anew, a ``retired`` that comes after
a new ``used`` is refused.
"""

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self, assert_never

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from ..records import (
    Entry,
    Incarnation,
    Sha256,
    StoredFile,
)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Listing(_Frozen):
    """Every file of one content, by name. Its digest follows from it: see ``listing_digest``."""

    root: str = ""
    """The file that is meant, and what lies in the folder of its name without suffix belongs to it; "": the
    folder of all files is meant."""
    files: tuple[StoredFile, ...]

    @model_validator(mode="after")
    def _belongs_together(self) -> Self:
        names = {file.name for file in self.files}
        if len(names) != len(self.files):
            raise ValueError("a file is listed twice")
        beside = _beside(self.root)
        strangers = [n for n in names if n != self.root and not n.startswith(beside)] if self.root else []
        if self.root and (self.root not in names or "/" in self.root or strangers):
            raise ValueError(f"the files do not belong to {self.root!r}: {strangers[:3]}")
        return self

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


class Stored(_Frozen):
    """All files of the content are in the store, under this incarnation's prefix."""

    kind: Literal["stored"] = "stored"
    incarnation: Incarnation
    listing: Sha256
    """Digest of the listing's object. The files are not named here: a record has a bounded size."""
    files: Annotated[int, Field(ge=1)]
    size_bytes: Annotated[int, Field(ge=0)]
    at: float


class Used(_Frozen):
    """A sweep that is about to be submitted needs this incarnation.

    ``claim`` is random per submission: who declares the users of a content to be gone names the claims that
    it knew, and one that it did not know stands in its way.
    """

    kind: Literal["used"] = "used"
    incarnation: Incarnation
    sweep: str
    claim: Incarnation
    at: float


class Retired(_Frozen):
    """The incarnation's data may be deleted: none of these claims is of a sweep that exists."""

    kind: Literal["retired"] = "retired"
    incarnation: Incarnation
    claims: tuple[Incarnation, ...] = ()
    at: float


class Reaped(_Frozen):
    """The retired incarnation's data is deleted."""

    kind: Literal["reaped"] = "reaped"
    incarnation: Incarnation
    at: float


ContentRecord = Annotated[Stored | Used | Retired | Reaped, Field(discriminator="kind")]
ContentEntry = Entry[ContentRecord]
CONTENT_ENTRY: TypeAdapter[ContentEntry] = TypeAdapter(ContentEntry)


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """One incarnation: complete if ``stored``, else given up before it was."""

    incarnation: str
    stored: Stored | None = None
    users: tuple[Used, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentState:
    """A content, as its log tells it. The empty state was never stored."""

    live: Upload | None = None
    retired: tuple[Upload, ...] = ()
    """Data possibly still there; oldest first."""
    reaped: frozenset[str] = frozenset()

    @property
    def readable(self) -> Stored | None:
        """What a reader fetches: the live incarnation, else one whose data was not deleted yet."""
        uploads = (self.live, *reversed(self.retired))
        return next((upload.stored for upload in uploads if upload and upload.stored), None)

    @property
    def condemned(self) -> frozenset[str]:
        """Incarnations that can never be stored (again)."""
        return self.reaped | {upload.incarnation for upload in self.retired}


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreferenced:
    """An incarnation that no sweep needs."""

    incarnation: str
    claims: tuple[str, ...] = ()
    stored: Stored | None = None
    """None: an upload that was never completed. It may still be under way: give it time before retiring it,
    or its uploader has to begin again."""


def fold(state: ContentState, entry: ContentEntry) -> ContentState:
    """Return the state after one more entry; a record that ``refusal`` would have refused changes nothing."""
    record = entry.record
    if refusal(state, record):
        return state
    match record:
        case Stored(incarnation=incarnation):
            return replace(state, live=Upload(incarnation=incarnation, stored=record))
        case Used():
            assert state.live is not None
            return replace(state, live=replace(state.live, users=(*state.live.users, record)))
        case Retired(incarnation=incarnation):
            live = state.live if state.live and state.live.incarnation == incarnation else None
            gone = live or Upload(incarnation=incarnation)
            return replace(state, live=None if live else state.live, retired=(*state.retired, gone))
        case Reaped(incarnation=incarnation):
            left = tuple(upload for upload in state.retired if upload.incarnation != incarnation)
            return replace(state, retired=left, reaped=state.reaped | {incarnation})
        case _:
            assert_never(record)


def refusal(state: ContentState, record: ContentRecord) -> str | None:
    """Say why the record may not be appended in this state, or None if it may."""
    live = state.live
    match record:
        case Stored(incarnation=incarnation):
            if incarnation in state.condemned:
                return f"incarnation {incarnation} was given up"
            return f"it is stored already, as incarnation {live.incarnation}" if live else None
        case Used(incarnation=incarnation):
            there = live is not None and live.incarnation == incarnation
            return None if there else f"incarnation {incarnation} is not stored (any more)"
        case Retired(incarnation=incarnation, claims=claims):
            if incarnation in state.condemned:
                return f"incarnation {incarnation} is retired already"
            users = live.users if live and live.incarnation == incarnation else ()
            news = sorted({user.sweep for user in users if user.claim not in claims})
            return f"it is used by {', '.join(news)}" if news else None
        case Reaped(incarnation=incarnation):
            known = any(upload.incarnation == incarnation for upload in state.retired)
            return None if known else f"incarnation {incarnation} is not retired"
        case _:
            assert_never(record)


def holds(state: ContentState, record: ContentRecord) -> bool:
    """Say whether the log already has this fact, so that appending it again is a no-op."""
    live = state.live
    match record:
        case Stored(incarnation=incarnation):
            return live is not None and live.incarnation == incarnation
        case Used(claim=claim):
            return live is not None and any(user.claim == claim for user in live.users)
        case Retired(incarnation=incarnation):
            return incarnation in state.condemned
        case Reaped(incarnation=incarnation):
            return incarnation in state.reaped
        case _:
            assert_never(record)


def unreferenced(
    state: ContentState, existing: Collection[str], seen: Iterable[str] = ()
) -> tuple[Unreferenced, ...]:
    """Return the incarnations of a content that may be retired.

    Args:
        existing: Names of the sweeps that exist, listed *after* the content's log was read: a submission
            records its use first and its sweep last.
        seen: Incarnations that have data in the store. Those that the log does not know are unfinished
            uploads.
    """
    found = []
    live = state.live
    if live and not any(user.sweep in existing for user in live.users):
        claims = tuple(user.claim for user in live.users)
        found.append(Unreferenced(incarnation=live.incarnation, claims=claims, stored=live.stored))
    known = state.condemned | ({live.incarnation} if live else set())
    return (*found, *(Unreferenced(incarnation=name) for name in sorted(set(seen) - known)))


def reapable(state: ContentState, existing: Collection[str]) -> tuple[Upload, ...]:
    """Return the retired incarnations whose data may be deleted, once their grace is over.

    One that an existing sweep used is not among them: that sweep was submitted while it was being retired,
    and reads it until its content is stored anew.
    """
    if state.live:
        return state.retired
    return tuple(u for u in state.retired if not any(user.sweep in existing for user in u.users))


def listing_digest(listing: Listing) -> str:
    """Return the digest by which content is named.

    A folder's is the sha256 of its sorted lines ``<sha256>  <name>``. A file's is its sha256; with a folder
    beside it, the sha256 of the line ``<sha256 of the file>  <digest of the folder>``.
    """
    if not listing.root:
        return _folder_digest((file.name, file.sha256) for file in listing.files)
    beside = _beside(listing.root)
    digest = next((file.sha256 for file in listing.files if file.name == listing.root), "")
    inside = [(f.name.removeprefix(beside), f.sha256) for f in listing.files if f.name != listing.root]
    return _sha256(f"{digest}  {_folder_digest(inside)}\n") if inside else digest


def _beside(root: str) -> str:
    return (root.rpartition(".")[0] or root) + "/"


def _folder_digest(files: Iterable[tuple[str, str]]) -> str:
    return _sha256("".join(f"{sha256}  {name}\n" for name, sha256 in sorted(files)))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
