"""Looks at a ``command:`` before it is launched: its program, its files, its inputs, does it resume."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from trainer.command.words import PYTHONS
from trainer.config import Command
from trainer.rundir import CheckpointPolicy

from ..errors import Problem, shown

SCRIPTS = (".py", ".sh")
_WHERE = "command.words"
_RELATIVE = "relative paths start at the folder of the sweep file"


def command_problems(command: Command, policy: CheckpointPolicy) -> Iterator[Problem]:
    """Return what is wrong with a command, or worth a warning, as far as this machine can tell."""
    yield from program_problems(command.words[0], _WHERE, "e.g. [accelerate, launch, train.py, …]")
    yield from script_problems(command.words[1:], _WHERE)
    for name, given in command.inputs.items():
        if "://" not in given.path and not Path(given.path).exists():
            message = f"input {name}: {given.path} does not exist"
            yield Problem("E2207", message, f"command.inputs.{name}", _RELATIVE)
    if command.needs_steps_between and policy.every_steps is None:
        message = "the command is told {every}, but checkpoint.every is a time"
        yield Problem("E2324", message, "checkpoint.every", "give it in steps, e.g. every: 50")
    if not command.resume and not any("resume" in word for word in command.words):
        message = "nothing among the command's words tells it to resume: a preemption would start it anew"
        yield Problem("W2325", message, _WHERE, "e.g. --resume_from_checkpoint=latest, or command.resume")


def program_problems(program: str, where: str, example: str) -> Iterator[Problem]:
    """Return what keeps a program from being started here. Our own interpreter's programs are found."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    if program in PYTHONS or "{" in program or shutil.which(program, path=path):
        return
    there = Path(program).is_file() and not os.access(program, os.X_OK)
    what = "is not executable" if there else "is not a program on this machine"
    yield Problem("E2321", f"{shown(program)} {what}", where, example)


def script_problems(words: tuple[str, ...], where: str) -> Iterator[Problem]:
    """Return the scripts among the words that are not there. Those in an input are the input's."""
    for word in words:
        if word.endswith(SCRIPTS) and "{" not in word and not Path(word).is_file():
            yield Problem("E2322", f"there is no file {shown(word)}", where, _RELATIVE)
