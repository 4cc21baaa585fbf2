"""Whether a training process still gets anywhere, and where it was when it did not.

What counts is what it tells (a line in its event file), a touch of its ``alive`` file in long work between
events, and before its first step also what it writes: a base model may be long in coming.
"""

import contextlib
import re
from dataclasses import dataclass, replace
from pathlib import Path

from .rundir import RunDir

LONGEST_LOOK_S = 2.0
"""No more than this is counted between two looks: who was frozen itself cannot say that nothing happened."""
LONG_STEPS = 10.0
"""So many times its own longest step a process may take for one, whatever the timeout."""
WRITTEN_BYTES = 1_000_000
DUMP_SIGNAL_NAME = "SIGUSR1"

_FRAME = re.compile(r'^  File "(?P<file>[^"\n]+)", line (?P<line>\d+) in (?P<function>\S+)', re.MULTILINE)
_THREAD = re.compile(r"^(?:Current thread|Thread) 0x[0-9a-f]+.*\(most recent call first\):$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Signs:
    """What can be seen of a process from outside; any change is a sign of life."""

    events_bytes: int = 0
    touched_ns: int = 0
    written_bytes: int = 0
    """Only until its first step, in whole ``WRITTEN_BYTES``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quiet:
    """For how long there was no sign, as far as somebody looked."""

    signs: Signs = Signs()
    looked_at: float | None = None
    seconds: float = 0.0


def looked(quiet: Quiet, signs: Signs, now: float) -> Quiet:
    """Return what is known after one more look."""
    if signs != quiet.signs or quiet.looked_at is None:
        return Quiet(signs=signs, looked_at=now)
    passed = min(max(0.0, now - quiet.looked_at), LONGEST_LOOK_S)
    return replace(quiet, looked_at=now, seconds=quiet.seconds + passed)


def hangs(quiet: Quiet, timeout_s: float | None, longest_step_s: float) -> bool:
    """Whether a process that has been quiet for so long will not go on by itself."""
    return timeout_s is not None and quiet.seconds > max(timeout_s, LONG_STEPS * longest_step_s)


def signs_of(run_dir: RunDir, written_bytes: int) -> Signs:
    """Look at a run directory."""
    events = touched = 0
    with contextlib.suppress(OSError):
        events = run_dir.events.stat().st_size
    with contextlib.suppress(OSError):
        touched = run_dir.alive.stat().st_mtime_ns
    return Signs(
        events_bytes=events,
        touched_ns=touched,
        written_bytes=written_bytes - written_bytes % WRITTEN_BYTES,
    )


def where(dump: str) -> str:
    """Return the innermost line of the main thread in a dump of all stacks; "" if there is none.

    ``faulthandler`` writes the main thread last.
    """
    threads = list(_THREAD.finditer(dump))
    frame = _FRAME.search(dump, threads[-1].end()) if threads else None
    return f"{Path(frame['file']).name}:{frame['line']} in {frame['function']}" if frame else ""


def dumped(dump: str) -> bool:
    """Whether a dump has reached its end, the outermost line of the main thread."""
    threads = list(_THREAD.finditer(dump))
    return bool(threads) and _FRAME.search(dump, threads[-1].end()) is not None and dump.endswith("\n")
