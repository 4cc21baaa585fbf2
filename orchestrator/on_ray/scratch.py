"""Where an agent keeps what its runs write on the node's disk.

A folder belongs to whoever holds the lock in it. Process ids would not do: containers that share a disk do
not see each other's, and may have the same.
"""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path

LOCK = "agent.lock"
_NEW = ".new-"
"""A folder is made under such a name, and gets its own once it is locked."""


def own_scratch() -> Path:
    """Return a new folder on the node's disk for this process, having removed those of agents that are dead.

    Raises:
        PermissionError: The folder is somebody else's, who could read and change what we write there.
    """
    root = Path(tempfile.gettempdir()) / f"orchestrate-{os.getuid()}"
    root.mkdir(exist_ok=True, mode=0o700)
    status = root.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise PermissionError(f"{root} is not a folder of ours: remove it, or set TMPDIR")
    root.chmod(0o700)
    for folder in root.iterdir():
        if not folder.name.startswith(_NEW):
            _remove_if_dead(folder)
    new = Path(tempfile.mkdtemp(prefix=_NEW, dir=root))
    # Never closed: the lock ends with this process, however that ends.
    descriptor = os.open(new / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    with contextlib.suppress(OSError):  # a disk that knows no locks: nobody can take it there
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return new.rename(root / new.name.removeprefix(_NEW))


def _remove_if_dead(folder: Path) -> None:
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        return  # not an agent's, or just removed by another
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        pass  # its agent lives
    finally:
        os.close(descriptor)
