"""Every key of the store is built and parsed here, and nowhere else.

    sweeps/<sweep>/spec.json
    sweeps/<sweep>/snapshot.json.zst                          a cache of the states of its runs
    sweeps/<sweep>/terms/<n>.json                             each time that a controller took office
    sweeps/<sweep>/drains/<n>.json                            which nodes are to be left alone
    runs/<run>/spec.json
    runs/<run>/log/<n>.json                                   the truth
    runs/<run>/snapshot.json.zst                              a cache of a long log's state
    runs/<run>/data/<attempt>-<incarnation>/<step>/<file>     one incarnation's own prefix
    runs/<run>/events/<attempt>/<n>.jsonl
    runs/<run>/logs/<attempt>/<n>.txt
    runs/<run>/samples/<step>/<file>
    content/<digest>/log/<n>.json                             who stored it, which sweeps use it
    content/<digest>/data/<incarnation>/<sha256>              its files, each under its own digest
    content/<digest>/data/<incarnation>/listing.json          their names

What tries a store out writes under ``probe/`` and deletes it (``garbage.inventory`` knows its keys).
Numbers are padded with zeros, so that key order is number order. Whatever cannot be a file name on a node's
disk is refused before it becomes a key: a bucket would take ``../../etc/passwd`` without a word.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from uuid import UUID

from .errors import InvalidName
from .records import CheckpointRef, Committed, StoredFile

MAX_KEY_BYTES = 900
"""Stores take 1024, of which the prefix in a store's url needs some."""
MAX_PART_BYTES = 255
"""The longest file name on the usual file systems."""

_UNPRINTABLE = re.compile(r"[\\\x00-\x1f\x7f-\x9f]")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_INCARNATION = re.compile(r"[0-9a-f]{8}")
# In each the digits are those that we write: those of other scripts would make a second key for a number.
_LOG_ENTRY = re.compile(r"(\d{12})\.json", re.ASCII)
_DATA_KEY = re.compile(r"runs/([^/]+)/data/(\d{6})-([0-9a-f]{8})/(\d{9})/(.+)", re.DOTALL | re.ASCII)
_BATCH_KEY = re.compile(r"runs/([^/]+)/(events|logs)/(\d{6})/(\d{6})\.(jsonl|txt)", re.ASCII)
_SAMPLE_KEY = re.compile(r"runs/([^/]+)/samples/(\d{9})/(.+)", re.DOTALL | re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}")
_CONTENT_KEY = re.compile(r"content/([0-9a-f]{64})/(?:log/\d{12}\.json|data/([0-9a-f]{8})/(.+))", re.ASCII)
_SPEC_KEY = re.compile(r"(runs|sweeps)/([^/]+)/spec\.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataKey:
    """One file of one checkpoint, as its key tells it."""

    run: str
    attempt: int
    incarnation: str
    step: int
    file: str

    @property
    def ref(self) -> CheckpointRef:
        return CheckpointRef(step=self.step, attempt=self.attempt)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchKey:
    """One batch of an attempt's events or log text."""

    run: str
    attempt: int
    n: int


def check_name(kind: str, name: str) -> str:
    """Return the name of a run or a sweep as it is.

    Raises:
        InvalidName: It is not made of 1 to 63 of ``a-z 0-9 . _ -``, starting with a letter or a digit.
    """
    if not _NAME.fullmatch(name):
        raise InvalidName(
            f"{kind} name {_shown(name)}: use 1 to 63 lower-case letters, digits, '.', '_' and '-', "
            "starting with a letter or a digit"
        )
    return name


def is_name(name: str) -> bool:
    """Whether ``check_name`` takes it."""
    return _NAME.fullmatch(name) is not None


def check_path(path: str, what: str = "key") -> str:
    """Return a relative POSIX path as it is.

    Raises:
        InvalidName: It could escape, collide with or not fit into a directory: an empty part, ``.`` or
            ``..``, a leading or trailing slash, a backslash, a control character, more than 900 bytes.
    """
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        raise InvalidName(f"{what} {_shown(path)}: not valid text") from None
    parts = path.split("/")
    if "" in parts:
        raise InvalidName(f"{what} {_shown(path)}: empty, or it has a leading, trailing or double '/'")
    if "." in parts or ".." in parts:
        raise InvalidName(f"{what} {_shown(path)}: '.' and '..' are not allowed")
    if _UNPRINTABLE.search(path):
        raise InvalidName(f"{what} {_shown(path)}: backslashes and control characters are not allowed")
    if len(encoded) > MAX_KEY_BYTES:
        raise InvalidName(f"{what} {_shown(path)}: {len(encoded)} bytes long, at most {MAX_KEY_BYTES}")
    longest = max(map(len, encoded.split(b"/")))
    if longest > MAX_PART_BYTES:
        raise InvalidName(f"{what} {_shown(path)}: a part is {longest} bytes long, at most {MAX_PART_BYTES}")
    return path


def check_files(names: Iterable[str]) -> None:
    """Check the file names of one checkpoint together.

    Raises:
        InvalidName: One is not a relative path (see ``check_path``), or two would be one file, or a file
            and a directory of one name, on a disk that does not tell upper from lower case.
    """
    files: dict[str, str] = {}
    directories: dict[str, str] = {}
    for name in names:
        check_path(name, "file name")
        folded = name.casefold()
        if folded in files:
            raise InvalidName(f"file name {_shown(name)}: collides with {_shown(files[folded])}")
        files[folded] = name
        parts = folded.split("/")
        directories.update(("/".join(parts[:n]), name) for n in range(1, len(parts)))
    for folded, name in files.items():
        if folded in directories:
            raise InvalidName(f"file name {_shown(name)}: also a directory of {_shown(directories[folded])}")


def sweep_prefix(sweep: str) -> str:
    return f"sweeps/{check_name('sweep', sweep)}/"


def sweep_spec(sweep: str) -> str:
    return f"{sweep_prefix(sweep)}spec.json"


def sweep_snapshot(sweep: str) -> str:
    return f"{sweep_prefix(sweep)}snapshot.json.zst"


def terms_prefix(sweep: str) -> str:
    return f"{sweep_prefix(sweep)}terms/"


def term(sweep: str, n: int) -> str:
    """The n-th time that a controller took office for the sweep."""
    return f"{terms_prefix(sweep)}{_number('term', n, 12)}.json"


def drains_prefix(sweep: str) -> str:
    """The log of what operators want of the nodes that train for the sweep."""
    return f"{sweep_prefix(sweep)}drains/"


def run_prefix(run: str) -> str:
    return f"runs/{check_name('run', run)}/"


def run_spec(run: str) -> str:
    return f"{run_prefix(run)}spec.json"


def run_snapshot(run: str) -> str:
    return f"{run_prefix(run)}snapshot.json.zst"


def parse_spec(key: str) -> tuple[str, str] | None:
    """Return ("runs" or "sweeps", name) if the key is a spec's."""
    found = _SPEC_KEY.fullmatch(key)
    return (found[1], found[2]) if found and _NAME.fullmatch(found[2]) else None


def run_log_prefix(run: str) -> str:
    return f"{run_prefix(run)}log/"


def log_entry(prefix: str, n: int) -> str:
    """The key of entry ``n`` of the log under ``prefix``."""
    return f"{prefix}{_number('log position', n, 12)}.json"


def parse_log_entry(prefix: str, key: str) -> int | None:
    """Return n if the key is that of an entry of the log under ``prefix``."""
    found = _LOG_ENTRY.fullmatch(key.removeprefix(prefix)) if key.startswith(prefix) else None
    return int(found[1]) if found else None


def data_prefix(run: str) -> str:
    """Everything that all attempts of a run uploaded for its checkpoints."""
    return f"{run_prefix(run)}data/"


def attempt_prefix(run: str, attempt: int, incarnation: str) -> str:
    """Everything that one incarnation of an attempt uploaded for its checkpoints."""
    return f"{data_prefix(run)}{_number('attempt', attempt, 6)}-{_check_incarnation(incarnation)}/"


def checkpoint_prefix(run: str, attempt: int, incarnation: str, step: int) -> str:
    return f"{attempt_prefix(run, attempt, incarnation)}{_number('step', step, 9)}/"


def checkpoint_file(run: str, attempt: int, incarnation: str, step: int, file: str) -> str:
    check_path(file, "file name")
    return check_path(checkpoint_prefix(run, attempt, incarnation, step) + file)


def stored_name(file: StoredFile) -> str:
    """What a file of a checkpoint is called in the store: a packed one says how it was packed."""
    return packed_name(file.name, file.packed.codec) if file.packed else file.name


def packed_name(name: str, codec: str) -> str:
    return f"{name}.{codec}"


def paths_of(names: Iterable[str]) -> frozenset[str]:
    """The files and the directories that a disk would have of files with these names, case-folded."""
    split = [name.casefold().split("/") for name in names]
    return frozenset("/".join(parts[:n]) for parts in split for n in range(1, len(parts) + 1))


def is_free(prefix: str, name: str, taken: Collection[str]) -> bool:
    """Whether a file may be stored under this name too, beside those that ``paths_of`` tells of."""
    try:
        check_path(prefix + name)
    except InvalidName:
        return False
    return name.casefold() not in taken


def committed_file(run: str, committed: Committed, file: str) -> str:
    """The key of one file of a committed checkpoint."""
    name = next((stored_name(f) for f in committed.files if f.name == file), file)
    return checkpoint_file(run, committed.attempt, committed.incarnation, committed.step, name)


def parse_data(key: str) -> DataKey | None:
    found = _DATA_KEY.fullmatch(key)
    if not found or not _NAME.fullmatch(found[1]):
        return None
    return DataKey(
        run=found[1], attempt=int(found[2]), incarnation=found[3], step=int(found[4]), file=found[5]
    )


def events_prefix(run: str, attempt: int | None = None) -> str:
    return _batches(run, "events", attempt)


def events_key(run: str, attempt: int, n: int) -> str:
    return f"{events_prefix(run, attempt)}{_number('batch', n, 6)}.jsonl"


def logs_prefix(run: str, attempt: int | None = None) -> str:
    return _batches(run, "logs", attempt)


def log_text_key(run: str, attempt: int, n: int) -> str:
    return f"{logs_prefix(run, attempt)}{_number('batch', n, 6)}.txt"


def parse_batch(key: str) -> BatchKey | None:
    """Return whose batch of events or log text the key is."""
    found = _BATCH_KEY.fullmatch(key)
    if not found or not _NAME.fullmatch(found[1]) or (found[2] == "events") != (found[5] == "jsonl"):
        return None
    return BatchKey(run=found[1], attempt=int(found[3]), n=int(found[4]))


def samples_prefix(run: str, step: int | None = None) -> str:
    prefix = f"{run_prefix(run)}samples/"
    return prefix if step is None else f"{prefix}{_number('step', step, 9)}/"


def sample_key(run: str, step: int, file: str) -> str:
    check_path(file, "file name")
    return check_path(samples_prefix(run, step) + file)


def parse_sample(key: str) -> tuple[str, int, str] | None:
    """Return (run, step, file) if the key is a sample's."""
    found = _SAMPLE_KEY.fullmatch(key)
    return (found[1], int(found[2]), found[3]) if found and _NAME.fullmatch(found[1]) else None


def probe_file(probe: UUID, file: str) -> str:
    """The key of what tries the store out; whoever writes it makes up the name, and deletes it."""
    return check_path(f"probe/{probe}/{file}")


def content_prefix(digest: str) -> str:
    return f"content/{_check_digest(digest)}/"


def content_log_prefix(digest: str) -> str:
    return f"{content_prefix(digest)}log/"


def content_data_prefix(digest: str, incarnation: str | None = None) -> str:
    """Everything that was uploaded of a content; of one incarnation of it, if that is given."""
    prefix = f"{content_prefix(digest)}data/"
    return prefix if incarnation is None else f"{prefix}{_check_incarnation(incarnation)}/"


def content_file(digest: str, incarnation: str, sha256: str) -> str:
    return f"{content_data_prefix(digest, incarnation)}{_check_digest(sha256)}"


def content_listing(digest: str, incarnation: str) -> str:
    return f"{content_data_prefix(digest, incarnation)}listing.json"


def parse_content(key: str) -> tuple[str, str | None] | None:
    """Return (digest, incarnation) if the key is content's; the incarnation is None for its log."""
    found = _CONTENT_KEY.fullmatch(key)
    return (found[1], found[2]) if found else None


def _check_digest(digest: str) -> str:
    if not _DIGEST.fullmatch(digest):
        raise InvalidName(f"digest {_shown(digest)}: expected 64 hexadecimal digits")
    return digest


def _check_incarnation(incarnation: str) -> str:
    if not _INCARNATION.fullmatch(incarnation):
        raise InvalidName(f"incarnation {_shown(incarnation)}: expected 8 hexadecimal digits")
    return incarnation


def _batches(run: str, kind: str, attempt: int | None) -> str:
    prefix = f"{run_prefix(run)}{kind}/"
    return prefix if attempt is None else f"{prefix}{_number('attempt', attempt, 6)}/"


def _number(what: str, n: int, digits: int) -> str:
    # A number that outgrew its padding would no longer sort where it belongs.
    if not 0 <= n < 10**digits:
        raise InvalidName(f"{what} {n}: expected 0 to {10**digits - 1}")
    return f"{n:0{digits}d}"


def _shown(text: str) -> str:
    """Attacker's text, made safe to print and short."""
    return ascii(text if len(text) <= 100 else text[:97] + "...")
