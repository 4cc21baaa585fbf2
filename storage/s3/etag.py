"""What servers call an object by its bytes: the MD5, or, of one that came in parts, the MD5 of their MD5s.

Some servers call it by something else: an object of such a name is of unknown bytes.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from .file_slice import FileSlice
from .uplink import part_bytes


def of_parts(md5s: Iterable[bytes]) -> str:
    """The usual name of an object that consists of parts with these digests."""
    digests = list(md5s)
    return f"{hashlib.md5(b''.join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}"


def is_of_file(etag: str | None, path: Path) -> bool:
    """Whether an object of this name consists of the bytes that a file has now, whole or in the parts that we
    cut it into. False also where nobody can tell.

    Raises:
        OSError: The file cannot be read, or changes meanwhile.
    """
    if not etag:
        return False
    with path.open("rb", buffering=0) as file:
        size_bytes = path.stat().st_size
        step = part_bytes(size_bytes) if "-" in etag else max(size_bytes, 1)
        slices = (
            FileSlice(file.fileno(), start, min(step, size_bytes - start))
            for start in range(0, max(size_bytes, 1), step)
        )
        md5s = [part.md5() for part in slices]
    return etag == (of_parts(md5s) if "-" in etag else md5s[0].hex())
