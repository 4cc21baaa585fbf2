"""Where an agent keeps what its runs write on the node's disk."""

import os
import shutil
import stat
import tempfile
from pathlib import Path

import psutil


def own_scratch() -> Path:
    """Return this process's folder on the node's disk, having removed those of agents that are dead.

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
        if folder.name.isdigit() and not psutil.pid_exists(int(folder.name)):
            shutil.rmtree(folder, ignore_errors=True)
    mine = root / str(os.getpid())
    mine.mkdir(exist_ok=True)
    return mine
