"""Notices of one's own: a file that appears, a program that succeeds, a url that answers 200.

What they say may be empty, a number of seconds, or a JSON object ``{"seconds": 30, "detail": "…", "kind":
"maintenance"}``; whatever else it is, it is shown to people, and the notice counts.
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from trainer.training_process import SECRETS

from .metadata import MAX_BYTES, Unreachable, ask
from .notice import Kind, Notice

COMMAND_S = 10.0
"""A program that takes longer is stopped, and has said nothing."""
LOOK_S = 0.02
_GUARD = ("/bin/sh", "-c", "read -r _; kill -s KILL 0")
"""Leads a program's process group, and kills it once nobody holds the other end of its stdin."""

MAX_DETAIL = 120


class File:
    """A file that is there while the node is about to end, as a preStop hook of Kubernetes leaves it.

    Seconds in it count from its last change. Removing it withdraws the notice.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def poll(self) -> Notice | None:
        try:
            with self._path.open("rb") as file:
                text = file.read(MAX_BYTES).decode(errors="replace")
                age_s = time.time() - os.fstat(file.fileno()).st_mtime
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise Unreachable(f"{self._path}: {error.strerror}") from error
        return said(text, f"file {self._path}", age_s=max(age_s, 0.0))


class Command:
    """A program that exits with 0 while the node is about to end. It gets none of the node's credentials.

    It ends with this process, with all that it started, also when this process is killed.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = tuple(command)

    def poll(self) -> Notice | None:
        name = self._command[0]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(SECRETS)}
        with _guarded(self._command, environment) as process:
            output = _output(process, time.monotonic() + COMMAND_S)
        if output is None:
            raise Unreachable(f"{name} did not end within {COMMAND_S:.0f} s")
        return said(output.decode(errors="replace"), name) if process.returncode == 0 else None


@contextlib.contextmanager
def _guarded(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Start a program; in the end it is killed with what it left behind, and reaped.

    It may be anybody's, so it cannot be asked to watch over us as a training process does: a shell beside it
    does, which the pipe tells of our end, however we end.

    Raises:
        Unreachable: It cannot be started.
    """
    with contextlib.ExitStack() as ends:
        try:
            null = subprocess.DEVNULL
            guard = subprocess.Popen(
                _GUARD, stdin=subprocess.PIPE, stdout=null, stderr=null, env={}, process_group=0
            )
            ends.callback(_end, guard, guard.pid)
            process = subprocess.Popen(
                command,
                stdin=null,
                stdout=subprocess.PIPE,
                stderr=null,
                env=environment,
                process_group=guard.pid,
            )
        except OSError as error:
            raise Unreachable(f"{command[0]} cannot be started: {error.strerror}") from error
        ends.callback(_end, process, guard.pid)
        yield process


def _end(process: subprocess.Popen[bytes], group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            pipe.close()


def _output(process: subprocess.Popen[bytes], deadline: float) -> bytes | None:
    """What a program printed, or the beginning of it; None if it has not ended by the deadline.

    Others may hold its end of the pipe after it, so the end of the output is not waited for.
    """
    assert process.stdout is not None
    pipe = process.stdout.fileno()
    os.set_blocking(pipe, False)
    output = b""
    while True:
        ended = _ended(process)
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(pipe, MAX_BYTES):
                output = (output + chunk)[:MAX_BYTES]
                if time.monotonic() > deadline:
                    break
        if ended:
            return output
        if time.monotonic() > deadline:
            return None
        time.sleep(LOOK_S)


def _ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether it has; it is left to be reaped, so that its group cannot become anybody else's."""
    if not hasattr(os, "waitid"):  # macOS, before Python 3.13
        return process.poll() is not None
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


class Url:
    """A service that answers with status 200 while the node is about to end, otherwise with 204 or 404."""

    def __init__(self, url: str) -> None:
        self._url = url

    def poll(self) -> Notice | None:
        answer = ask(self._url)
        if answer.status == 200:
            return said(answer.text, "url")
        if answer.status in (204, 404):
            return None
        raise Unreachable(f"the url answers with status {answer.status}, expected 200, 204 or 404")


def said(text: str, source: str, *, age_s: float = 0.0) -> Notice:
    """Return the notice that such a text is."""
    told: object = text.strip()
    with contextlib.suppress(ValueError, RecursionError):
        told = json.loads(text)
    left_s, detail, kind = None, "", Kind.TERMINATE
    match told:
        case dict():
            left_s, detail = _seconds(told.get("seconds")), str(told.get("detail", ""))
            with contextlib.suppress(ValueError):
                kind = Kind(str(told.get("kind")))
        case bool():
            detail = str(told)
        case int() | float():
            left_s = _seconds(told)
        case _:
            detail = str(told)
    shown = "".join(c if c.isprintable() else " " for c in detail)[:MAX_DETAIL]
    return Notice(kind=kind, source=source, detail=shown, left_s=None if left_s is None else left_s - age_s)


def _seconds(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e9 and math.isfinite(value) else None
