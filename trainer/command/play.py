"""Plays one program from its start to its end; see the package."""

import os
import select
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from storage.errors import InvalidName
from storage.local import DISK_FULL

from ..config.command import Command
from ..errors import BadInput, CommandFailed, DiskFull
from ..narration import say
from ..orders import read_options, read_spec, wait_for_order
from ..pulse import Pulse
from ..rundir import (
    EXIT_BAD_CHECKPOINT,
    EXIT_BAD_CONFIG,
    EXIT_COMPLETE,
    EXIT_PREEMPTED,
    RunDir,
    append_event,
)
from ..stop import Stop
from .output import Lines, Output, Told
from .program import Program, end_like
from .taking import restore, result_files, take
from .watch import Watch, tell_checkpoint
from .words import arguments, environment

POLL_S = 0.05
TAKING_S = 3.0
"""So long before it is killed itself it kills a program that was asked to stop: something may be left to
take."""
STANDING_S = 0.2
"""A progress bar that has not moved for so long is read as it stands."""
EOF_S = 5.0
"""How long what it left running may keep its output open."""


def play(run_dir: RunDir, stop: Stop, given: Mapping[str, str] = os.environ) -> int:
    """Play the program of a run directory and return the exit code of ``trainer.rundir``.

    Args:
        given: The environment to start it in.

    Raises:
        TrainerError: Whatever ended the attempt; its ``exit_code`` says what that means.
    """
    stop.left_s = lambda: run_dir.left_s(time.monotonic())
    spec, options = read_spec(run_dir), read_options(run_dir)
    assert spec.command is not None
    out = run_dir.root / "out"
    out.mkdir()
    order = wait_for_order(run_dir)
    restored = None
    if order.resume is not None:
        folder = run_dir.root / order.resume
        restored = restore(folder, out, spec.command.checkpoints, int(folder.name.removeprefix("step-")))
    words = arguments(spec.command, options, out, restored.path if restored else None)
    append_event(run_dir.events, "started", step=restored.step if restored else 0)
    say(f"starting {' '.join(words)}")
    stop.exit_at_once = False
    try:
        program = Program(words, out, environment(given, options))
    except OSError as error:
        raise CommandFailed(f"command: {words[0]}: {error.strerror}") from error
    return _Play(spec.command, run_dir, out, program, stop, restored.step if restored else 0).to_the_end()


class _Play:
    def __init__(
        self, command: Command, run_dir: RunDir, out: Path, program: Program, stop: Stop, step: int
    ) -> None:
        self._command = command
        self._run_dir = run_dir
        self._out = out
        self._program = program
        self._stop = stop
        self._told_step = step
        self._told_at: float | None = None
        self._alive = Pulse(run_dir.alive)
        self._checkpoints = Watch(command, run_dir, out, program, step, self._alive, self._tell)
        self._output = Output(command.progress, command.steps)
        self._asked_to_dump = threading.Event()
        self._telling = threading.Lock()
        self._reader = threading.Thread(target=self._read, daemon=True, name="output")

    def to_the_end(self) -> int:
        signal.signal(signal.SIGUSR1, lambda number, frame: self._asked_to_dump.set())
        self._reader.start()
        try:
            self._watch()
        finally:
            self._program.send(signal.SIGKILL)
        self._reader.join(EOF_S)
        return self._ended()

    def _watch(self) -> None:
        """Wait for the end of the process that was started, or once it is to stop, of all that it started."""
        asked = False
        while self._program.exit_code is None or (asked and self._program.living()):
            self._checkpoints.look(time.monotonic())
            if self._stop.requested and not asked:
                asked = True
                say("asked to stop: telling the command")
                self._program.send(signal.SIGTERM)
            left_s = self._stop.left_s()
            if asked and left_s is not None and left_s < TAKING_S:
                say("the command has not ended in time")
                return
            if self._asked_to_dump.is_set():  # it hangs, and is about to be killed: Python tells its stacks
                self._program.send(signal.SIGABRT)
                while True:
                    time.sleep(POLL_S)
            time.sleep(POLL_S)

    def _ended(self) -> int:
        codes, code = self._program.codes, self._program.exit_code
        said_so = EXIT_PREEMPTED in codes or (bool(codes) and codes[-1] == EXIT_COMPLETE)
        asked = self._stop.requested
        if code == EXIT_COMPLETE and (not asked or self._told_step >= self._command.steps):
            return self._finish()
        if said_so:  # whoever ends of its own will has written what it wrote
            self._checkpoints.take_the_last()
        if asked or code == EXIT_PREEMPTED:
            return EXIT_PREEMPTED
        assert code is not None
        return self._failed(code)

    def _finish(self) -> int:
        began, command = time.monotonic(), self._command
        files = result_files(self._out, command.result, command.checkpoints)
        try:
            take(self._run_dir.checkpoints, command.steps, files, metrics=self._output.metrics, final=True)
        except InvalidName as error:
            raise BadInput(f"the result cannot be stored: {error}") from error
        except OSError as error:
            if error.errno in DISK_FULL:
                raise DiskFull(f"DISK_FULL: {self._run_dir.checkpoints}: {error.strerror}") from error
            raise
        self._tell(Told(step=command.steps))
        tell_checkpoint(self._run_dir, command.steps, began)
        append_event(self._run_dir.events, "complete", step=command.steps)
        say(f"the result is complete: {', '.join(files)}")
        return EXIT_COMPLETE

    def _failed(self, code: int) -> int:
        """Tell what it died of, and end as it did. Codes that mean something else to us are not passed on."""
        kind, message = self._output.exception or (CommandFailed.__name__, self._output.last)
        said = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        append_event(
            self._run_dir.events, "error", type=kind, message=message, hint=f"the command ended: {said}"
        )
        return (
            end_like(code) if code in (EXIT_BAD_CHECKPOINT, EXIT_BAD_CONFIG) or code < 0 or code > 128 else 1
        )

    def _read(self) -> None:
        """Its output, until nobody holds it any more: into the log, and what it tells into the events."""
        lines, output = Lines(), self._program.output.fileno()
        ended = False
        while not ended:
            if not select.select([output], [], [], STANDING_S)[0]:
                self._take_in(lines.standing())
            printed = os.read(output, 1 << 16)
            ended = not printed
            self._alive()
            whole, kept = lines.cut(printed, time.monotonic(), ended=ended)
            self._take_in(whole)
            _write(kept)

    def _take_in(self, lines: list[str]) -> None:
        for line in lines:
            if told := self._output.line(line):
                self._tell(told)

    def _tell(self, told: Told) -> None:
        with self._telling:
            if told.step <= self._told_step:
                return
            now = time.monotonic()
            step_s = (now - self._told_at) / (told.step - self._told_step) if self._told_at else None
            self._told_step, self._told_at = told.step, now
            row = {"loss": told.loss, "lr": told.lr, "step_s": step_s}
            known = {name: value for name, value in row.items() if value is not None}
            append_event(self._run_dir.events, "step", step=told.step, **known)


def _write(text: bytes) -> None:
    """Into the log. On a full disk it is lost."""
    while text:
        try:
            text = text[os.write(1, text) :]
        except OSError:
            return
