"""Which of a program's checkpoints are complete, seen from outside.

A checkpoint is complete once nothing about its files (names, sizes, times of change, inodes) has changed for
a while *as somebody looked on*, no process of the program holds one of them open for writing, and the file
that the program writes last is there, if the sweep file names one. A program that was killed while it wrote
therefore leaves nothing that counts. One that ended by itself, saying that all is well, writes no more: then
what is there is complete at once.
"""

import contextlib
import fnmatch
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

Listing = tuple[tuple[str, int, int, int], ...]
"""Of each file its name below the checkpoint ("." for a checkpoint that is one file), size, time of change in
ns, and inode."""

_NUMBER = re.compile(r"(?:.*\D)?(\d{1,9})", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Entry:
    """Something named like a checkpoint."""

    step: int
    path: Path


@dataclass(frozen=True, slots=True)
class Seen:
    """What a checkpoint was like at the last look, and how long it had been so, as far as somebody looked."""

    listing: Listing
    looked_at: float
    quiet_s: float = 0.0


def step_of(name: str, pattern: str) -> int | None:
    """Return the step in a checkpoint's name, the number at the end of what ``*`` stands for.

    None if it is not named so: ``checkpoint-50.tmp`` is no ``checkpoint-*``.
    """
    before, _, after = pattern.partition("*")
    if len(name) < len(before) + len(after) or not name.startswith(before) or not name.endswith(after):
        return None
    found = _NUMBER.fullmatch(name[len(before) : len(name) - len(after)])
    return int(found[1]) if found else None


def entries(out: Path, pattern: str) -> list[Entry]:
    """Return what is named like a checkpoint, by step. ``pattern`` as in ``Command.checkpoints``."""
    path = PurePosixPath(pattern)
    found = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for child in (out / path.parent).iterdir():
            step = step_of(child.name, path.name)
            if step is not None and not child.is_symlink():
                found.append(Entry(step, child))
    return sorted(found, key=lambda entry: (entry.step, entry.path.name))


def listing(path: Path) -> Listing:
    """Look at a checkpoint without opening anything in it. Empty if it is not there.

    Raises:
        OSError: It changes right now, or cannot be read.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        return ()
    if not stat.S_ISDIR(status.st_mode):
        return ((".", status.st_size, status.st_mtime_ns, status.st_ino),)
    return tuple(sorted(_of_files(path)))


def looked(before: Seen | None, there: Listing, now: float, *, written: bool, longest_s: float) -> Seen:
    """Return what is known of a checkpoint after one more look.

    Args:
        written: Somebody has a file of it open for writing.
        longest_s: No more than this counts between two looks: who was busy elsewhere has not looked on.
    """
    if written or before is None or before.listing != there:
        return Seen(there, now)
    return Seen(there, now, before.quiet_s + min(now - before.looked_at, longest_s))


def is_complete(seen: Seen, *, quiet_s: float, marker: str | None) -> bool:
    """Whether a checkpoint has been whole and quiet for long enough; see the top of this module."""
    return bool(seen.listing) and seen.quiet_s >= quiet_s and has_marker(seen.listing, marker)


def has_marker(there: Listing, marker: str | None) -> bool:
    """Whether the file that is written last is among a checkpoint's files."""
    return marker is None or any(fnmatch.fnmatchcase(name, marker) for name, *_ in there)


def is_being_written(path: Path, pids: Iterable[int]) -> bool:
    """Whether one of these processes has a file of a checkpoint open for writing. Told on Linux only."""
    return any(_holds_open(pid, os.path.realpath(path)) for pid in pids)


def _of_files(folder: Path) -> Iterator[tuple[str, int, int, int]]:
    for directory, _, names in os.walk(folder, onerror=_raise):
        for name in names:
            path = Path(directory, name)
            status = path.stat()
            yield path.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns, status.st_ino


def _raise(error: OSError) -> None:
    raise error


def _holds_open(pid: int, path: str) -> bool:
    with contextlib.suppress(OSError):
        for descriptor in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError, ValueError, IndexError):
                target = os.readlink(f"/proc/{pid}/fd/{descriptor}")
                if target == path or target.startswith(f"{path}/"):
                    info = Path(f"/proc/{pid}/fdinfo/{descriptor}").read_text()
                    flags = int(info.split("flags:")[1].split()[0], 8)
                    if flags & os.O_ACCMODE != os.O_RDONLY:
                        return True
    return False
