"""What the kernel says about a process's memory: its limit, what is left, and whom it killed for want of it.

Read from the process's control group, version 1 or 2, as far as it can be seen from here; in a container that
is the container's. Without any, the machine's own count is taken.
"""

import contextlib
from pathlib import Path

import psutil

from ..evidence import Evidence

RECENT_S = 30.0
"""A kill longer ago than this was not this process's: others may share its control group."""

_CGROUPS = Path("/sys/fs/cgroup")
_COUNTS = ("memory.events", "memory.oom_control")


class MemoryWatch:
    """Watches the memory of one process, from its start."""

    def __init__(self, pid: int) -> None:
        self._groups = _groups_of(pid)
        self._looks: list[tuple[float, int]] = []

    def look(self, now: float) -> None:
        """Note how many were killed so far; to be called every now and then."""
        kills = self._kills()
        older = [look for look in self._looks if look[0] <= now - RECENT_S]
        self._looks = [*older[-1:], *(look for look in self._looks if look[0] > now - RECENT_S), (now, kills)]

    def seen(self, now: float) -> Evidence:
        """Return what is known at the process's end."""
        self.look(now)
        recent = self._looks[-1][1] - self._looks[0][1]
        return Evidence(oom_kills=max(0, recent), memory_bytes=self._limit_bytes() if recent > 0 else None)

    def _kills(self) -> int:
        for group in self._groups:
            for name in _COUNTS:
                if (count := _field(group / name, "oom_kill")) is not None:
                    return count
        return _field(Path("/proc/vmstat"), "oom_kill") or 0

    def _limit_bytes(self) -> int:
        limits = [psutil.virtual_memory().total]
        for group in self._groups[:1]:
            for name in ("memory.max", "memory.limit_in_bytes"):
                with contextlib.suppress(OSError, ValueError):
                    limits.append(int((group / name).read_text()))
        return int(min(limits))


def free_bytes(pid: int) -> int:
    """Return what a process may still take before the kernel kills for want of memory.

    The least of what the machine has available and what the process's control groups leave, of which files
    that were read and can be dropped take nothing away.
    """
    free = [int(psutil.virtual_memory().available)]
    for group in _groups_of(pid)[:1]:
        for folder in (group, *group.parents):
            if not folder.is_relative_to(_CGROUPS):
                break
            free += _left_of(folder)
    return max(0, min(free))


def _left_of(group: Path) -> list[int]:
    """What a control group leaves of its limit; nothing if it has none."""
    for limit, used, droppable in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, ValueError):
            left = int((group / limit).read_text()) - int((group / used).read_text())
            return [left + (_field(group / "memory.stat", droppable) or 0)]
    return []


def _groups_of(pid: int) -> list[Path]:
    """The folders that may be the process's memory control group, the likeliest first."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                root = _CGROUPS / controllers
                folders = (root / path.lstrip("/"), root)
                found = [folder for folder in folders if any((folder / name).exists() for name in _COUNTS)]
                if found:
                    return found
    return []


def _field(path: Path, name: str) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return None
