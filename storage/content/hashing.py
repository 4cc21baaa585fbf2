"""Digests of files on this machine, which are read again only if they may have changed.

What was hashed is remembered with what the directory says of the file: size, times of change, inode. A file
that changed within ``RACY_NS`` of being hashed is hashed again, because its next change might show in none of
these. The memory is a cache: one that is damaged or cannot be written costs time.
"""

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from ..records import Sha256, StoredFile
from .state import Listing
from .store import Identity, LocalContent

RACY_NS = 2_000_000_000
_FACTS = TypeAdapter(dict[str, dict[str, Sha256]])
"""By path: the digest by what the directory says."""


def hashed(root: str, paths: Mapping[str, Path], memory: Path | None = None) -> LocalContent:
    """Return the content that consists of these files, in the order of names.

    Args:
        root: See ``Listing``.
        memory: Folder of what was hashed before; None: read every file.

    Raises:
        OSError: A file cannot be read.
    """
    where = _where(memory, paths) if memory and paths else None
    known = _recall(where) if where else {}
    files, identities, facts = [], {}, {}
    for name in sorted(paths):
        identity = Identity.of(paths[name])
        began_ns = time.time_ns()
        sha256 = known.get(str(paths[name].absolute()), {}).get(_key(identity)) or _sha256(paths[name])
        files.append(StoredFile(name=name, size_bytes=identity.size_bytes, sha256=sha256))
        identities[name] = identity
        if max(identity.mtime_ns, identity.ctime_ns) + RACY_NS < began_ns:
            facts[str(paths[name].absolute())] = {_key(identity): sha256}
    if where and facts != known:
        _remember(where, facts)
    return LocalContent(listing=Listing(root=root, files=tuple(files)), paths=paths, identities=identities)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _key(identity: Identity) -> str:
    return f"{identity.size_bytes} {identity.mtime_ns} {identity.ctime_ns} {identity.inode}"


def _where(memory: Path, paths: Mapping[str, Path]) -> Path:
    """One file for all files of a content, named after the folder that they lie in."""
    common = os.path.commonpath([str(path.absolute()) for path in paths.values()])
    return memory / f"{hashlib.sha256(common.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.json"


def _recall(where: Path) -> dict[str, dict[str, str]]:
    try:
        facts = json.loads(where.read_bytes())
    except (OSError, ValueError):
        return {}
    try:
        return _FACTS.validate_python(facts, strict=True)
    except ValidationError:
        return {}


def _remember(where: Path, facts: Mapping[str, Mapping[str, str]]) -> None:
    with contextlib.suppress(OSError):
        where.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=where.parent, prefix=".tmp-")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(facts, file)
            os.replace(temporary, where)
        except BaseException:
            os.unlink(temporary)
            raise
