"""The watch over a program's checkpoints: takes the newest complete one, while the program works."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from storage.errors import InvalidName
from storage.local import DISK_FULL, free_superseded

from ..config.command import Command
from ..errors import BadInput
from ..narration import say
from ..rundir import RunDir, append_event
from .folders import Entry, Seen, entries, has_marker, is_being_written, is_complete, listing, looked
from .output import Told
from .program import Program
from .taking import files_of, take

LOOK_S = 0.5
"""Between looks, or a fifth of ``quiet_s`` if that is less."""


class Watch:
    """Looks at one program's output folder.

    Args:
        step: What is up to here is in the store already.
        alive: Called when something has changed: the program works.
        tell: Gets the step of each checkpoint that is taken.
    """

    def __init__(
        self,
        command: Command,
        run_dir: RunDir,
        out: Path,
        program: Program,
        step: int,
        alive: Callable[[], None],
        tell: Callable[[Told], None],
    ) -> None:
        self._command = command
        self._run_dir = run_dir
        self._out = out
        self._program = program
        self._taken_step = step
        self._alive = alive
        self._tell = tell
        self._seen: dict[Path, Seen] = {}
        self._next_look = float("-inf")
        self._disk_is_full = False

    def look(self, now: float) -> None:
        """Take the newest checkpoint that is complete, if it is a new one."""
        every_s = min(LOOK_S, self._command.quiet_s / 5)
        if now < self._next_look:
            return
        self._next_look = now + every_s
        new_ones = self._new_ones()
        pids = [process.pid for process in self._program.living()] if new_ones else []
        complete: list[tuple[Entry, Seen]] = []
        for entry in new_ones:
            before = self._seen.get(entry.path)
            try:
                there, written = listing(entry.path), is_being_written(entry.path, pids)
            except OSError:  # it changes right now
                self._seen.pop(entry.path, None)
                continue
            if before is None or before.listing != there:
                self._alive()
            seen = looked(before, there, now, written=written, longest_s=2 * every_s)
            self._seen[entry.path] = seen
            if is_complete(seen, quiet_s=self._command.quiet_s, marker=self._command.complete):
                complete.append((entry, seen))
        # Whoever had a file open a moment ago may have died since: then it is not complete.
        if complete and self._program.exit_code is None:
            self._take(*complete[-1])

    def take_the_last(self) -> None:
        """Take the newest checkpoint of a program that has ended and said that all is well."""
        for entry in reversed(self._new_ones()):
            with contextlib.suppress(OSError):  # it cannot be read: the one before can, perhaps
                seen = Seen(listing(entry.path), 0.0)
                if seen.listing and has_marker(seen.listing, self._command.complete):
                    self._take(entry, seen)
                    return

    def _new_ones(self) -> list[Entry]:
        found = entries(self._out, self._command.checkpoints)
        if found and found[-1].step > self._command.steps:
            raise BadInput(
                f"{found[-1].path.name} is beyond command.steps, {self._command.steps}",
                "set command.steps to its last step, counted as its checkpoints are",
            )
        # Nothing resumes from the last step: what counts there is the result.
        return [entry for entry in found if self._taken_step < entry.step < self._command.steps]

    def _take(self, entry: Entry, seen: Seen) -> None:
        began = time.monotonic()
        try:
            files = files_of(entry.path, self._out)
            is_there = take(
                self._run_dir.checkpoints,
                entry.step,
                files,
                metrics={},
                final=False,
                unchanged=lambda: listing(entry.path) == seen.listing,
            )
        except InvalidName as error:
            raise BadInput(f"{entry.path.name} cannot be stored: {error}") from error
        except OSError as error:
            self._untaken(entry, error)
            return
        if not is_there:
            self._seen.pop(entry.path, None)
            return
        self._disk_is_full = False
        self._taken_step = entry.step
        self._tell(Told(step=entry.step))
        self._alive()
        tell_checkpoint(self._run_dir, entry.step, began)
        say(f"{entry.path.name} is complete")

    def _untaken(self, entry: Entry, error: OSError) -> None:
        """It went, changed, or the disk is full: the next look shows."""
        if error.errno in DISK_FULL:
            free_superseded(self._run_dir.checkpoints, 1)
            if not self._disk_is_full:
                message = f"{entry.path.name}: {error.strerror}"
                append_event(self._run_dir.events, "disk_full", step=entry.step, message=message)
            self._disk_is_full = True


def tell_checkpoint(run_dir: RunDir, step: int, began: float) -> None:
    """Say in an event that a checkpoint was written. For how long the program stood still nobody knows."""
    took_s = time.monotonic() - began
    append_event(run_dir.events, "checkpoint", step=step, stall_s=0.0, write_s=took_s, inflation_s=0.0)
