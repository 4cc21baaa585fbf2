"""The watch over one training process: does it hang, and what was around it when it ended."""

import contextlib
import logging
import shutil
import time
from dataclasses import replace

import psutil

from .evidence import Evidence
from .hang import Quiet, dumped, hangs, looked, signs_of, where
from .memory.host import MemoryWatch
from .rundir import RunDir
from .training_process import TrainingProcess

LOOK_EVERY_S = 1.0
DUMP_S = 5.0
"""How long a process that hangs may take to write its stacks. One that is stopped cannot."""
MAX_DUMP_BYTES = 1_000_000

logger = logging.getLogger(__name__)


class Vigil:
    """Looks at one process, about once a second, from when it was told to start."""

    def __init__(self, process: TrainingProcess, run_dir: RunDir, timeout_s: float | None) -> None:
        self._process = process
        self._run_dir = run_dir
        self._timeout_s = timeout_s
        self._memory = MemoryWatch(process.pid)
        self._memory.look(time.monotonic())  # who dies while nobody watches yet is missed against this
        self._quiet = Quiet()
        self._next_look = float("-inf")
        self._longest_step_s = 0.0
        self._hung_s = 0.0

    def hangs(self, *, training: bool, step_s: float) -> bool:
        """Look, and say whether the process hangs.

        Args:
            training: It has made its first step.
            step_s: How long its last one took.
        """
        now = time.monotonic()
        if now < self._next_look:
            return False
        self._next_look = now + min(LOOK_EVERY_S, (self._timeout_s or LOOK_EVERY_S) / 4)
        self._memory.look(now)
        self._longest_step_s = max(self._longest_step_s, step_s)
        signs = signs_of(self._run_dir, 0 if training else self._moved_bytes())
        self._quiet = looked(self._quiet, signs, now)
        return hangs(self._quiet, self._timeout_s, self._longest_step_s)

    def end(self) -> str:
        """Have a process that hangs write its stacks into its log, and kill it; returns what to tell."""
        self._hung_s = self._quiet.seconds
        dump = self._dump()
        self._process.kill()
        at = where(dump)
        logger.warning("%s: no sign of life for %.0f s, killed %s", self._run_dir.root.name, self._hung_s, at)
        return f"nothing happened for {self._hung_s:.0f} s" + (f", it was at {at}" if at else "")

    def evidence(self, said: Evidence) -> Evidence:
        """Return what the process told of itself, with what is seen of its end."""
        seen = self._memory.seen(time.monotonic())
        free: int | None = None
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(self._run_dir.root).free
        return replace(
            said,
            hung_s=self._hung_s,
            oom_kills=seen.oom_kills,
            memory_bytes=said.memory_bytes or seen.memory_bytes,
            disk_free_bytes=free,
        )

    def _dump(self) -> str:
        log, begin = self._run_dir.log, 0
        with contextlib.suppress(OSError):
            begin = log.stat().st_size
        self._process.dump()
        give_up, text = time.monotonic() + DUMP_S, ""
        while time.monotonic() < give_up and self._process.exit_code is None:
            before = text
            with contextlib.suppress(OSError), log.open("rb") as file:
                file.seek(begin)
                text = file.read(MAX_DUMP_BYTES).decode(errors="replace")
            if dumped(text) and text == before:
                break
            time.sleep(0.1)
        return text

    def _moved_bytes(self) -> int:
        """What it has read and written, of files at least: a base model or a dataset that is on its way."""
        # Not every system counts, and not every container lets us look.
        with contextlib.suppress(psutil.Error, AttributeError, OSError, RuntimeError, ValueError):
            counted = psutil.Process(self._process.pid).io_counters()
            return int(counted.read_chars + counted.write_chars + counted.read_bytes)
        return 0
