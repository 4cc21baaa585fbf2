"""What a program is started with: its words with their placeholders filled, its environment, its inputs."""

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from storage.content.hashing import hashed
from storage.content.store import LocalContent

from ..config.command import CHECKPOINT, EVERY, OUT, STEPS, Command, Input, filled
from ..errors import BadInput, CommandFailed
from ..model_files import model_content
from ..rundir import GPU_CHECK, Options, cache_folder

PYTHONS = ("python", "python3")


def arguments(command: Command, options: Options, out: Path, restored: Path | None) -> list[str]:
    """Return the program and its arguments on this node.

    Raises:
        BadInput: An input is neither here nor in the store, or ``{every}`` has no steps.
        CommandFailed: The program is not on this node.
    """
    values = {OUT: str(out), STEPS: str(command.steps)}
    if command.needs_steps_between:
        if options.checkpoint.every_steps is None:
            raise BadInput("{every} in the command's words needs checkpoint.every in steps, e.g. every: 50")
        values[EVERY] = str(options.checkpoint.every_steps)
    values |= {name: _place(name, given, options) for name, given in command.inputs.items()}
    if restored is not None:
        values[CHECKPOINT] = str(restored)
    words = filled(command.words, values)
    if restored is not None:
        words += filled(command.resume, values)
    return [_program(words[0]), *words[1:]]


def environment(given: Mapping[str, str], options: Options) -> dict[str, str]:
    """Return the variables that a program gets: those of the training process, which has none of the store's.

    Our interpreter's programs, such as ``accelerate``, are found; a Python that dies tells its stacks.
    """
    ours = {name: value for name, value in given.items() if name != GPU_CHECK}
    path = ours.get("PATH", os.defpath)
    defaults = {"PYTHONFAULTHANDLER": "1"}
    if options.threads:
        defaults["OMP_NUM_THREADS"] = str(options.threads)
    return defaults | ours | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{path}"}


def input_content(path: Path, memory: Path | None = None) -> LocalContent:
    """Return the files of an input, a folder or one file. Hidden files do not count.

    Args:
        memory: See ``storage.content.hashing``.
    """
    return hashed(path.name, {path.name: path}, memory) if path.is_file() else model_content(path, memory)


def _place(name: str, given: Input, options: Options) -> str:
    if given.digest and (copy := options.content.get(given.digest)):
        return copy  # verified when it was fetched
    path = Path(given.path).expanduser()
    if not path.exists():
        raise BadInput(f"input {name}: {path} is not on this node", "storage.upload_inputs: always sends it")
    if (
        given.digest
        and (found := input_content(path, cache_folder(options) / "digests").digest) != given.digest
    ):
        raise BadInput(
            f"input {name}: {path} has digest {found[:12]}, the run was submitted with {given.digest[:12]}",
            "restore its files, or submit a new sweep",
        )
    return str(path)


def _program(word: str) -> str:
    if word in PYTHONS:
        return sys.executable
    beside = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    if found := shutil.which(word, path=beside):
        return found
    raise CommandFailed(f"command: {word} is not a program on this node", "install it on every node")
