"""Scores sample images with somebody's command: its last line of output is a JSON object of numbers."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

from .config import Evaluate
from .errors import EvaluationFailed
from .stop import Stop

SECRETS = ("_TOKEN", "_KEY", "_SECRET", "PASSWORD")
"""How the names of environment variables end that somebody's command has no use for."""
_POLL_S = 0.1


def evaluate(evaluation: Evaluate, samples: Path, stop: Stop) -> dict[str, float]:
    """Run the command on a folder of samples and return its scores.

    The command runs in this process's group, so it dies with it; ``python`` as its first word is the
    interpreter that runs us. What it prints goes to our own output too. It sees no credentials.

    Raises:
        EvaluationFailed: It exits with another code than 0, takes longer than ``timeout_s``, or its last line
        is
            not an object of finite numbers.
        Stopped: A stop was requested meanwhile; the command was killed.
    """
    command = [word.replace("{samples}", str(samples)) for word in evaluation.command]
    if command[0] in ("python", "python3"):
        command[0] = sys.executable
    output = _run(command, evaluation.timeout_s, stop)
    sys.stdout.write(output)
    sys.stdout.flush()
    return scores(output)


def scores(output: str) -> dict[str, float]:
    """Read the scores from the last line that a command printed.

    Raises:
        EvaluationFailed
    """
    lines = output.strip().splitlines()
    last = lines[-1] if lines else ""
    try:
        row = json.loads(last)
    except ValueError:
        row = None
    numeric = isinstance(row, dict) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        for value in row.values()
    )
    if not row or not numeric:
        raise EvaluationFailed(
            f"evaluate.command: its last line of output is {last[:200]!r}",
            'it must be a JSON object of finite numbers, such as {"accuracy": 0.9}',
        )
    return {str(name): float(value) for name, value in row.items()}


def _run(command: list[str], timeout_s: float, stop: Stop) -> str:
    shown = " ".join(command)
    environment = {k: v for k, v in os.environ.items() if not k.upper().endswith(SECRETS)}
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment)
    except OSError as error:
        raise EvaluationFailed(f"evaluate.command: {shown}: {error.strerror}") from error
    deadline = time.monotonic() + timeout_s
    with process:
        try:
            output = _wait(process, deadline, stop)
        except BaseException:
            process.kill()
            raise
    if output is None:
        raise EvaluationFailed(f"evaluate.command: {shown}: no result in {timeout_s:g} s", "raise timeout_s")
    if process.returncode:
        said = f"exit code {process.returncode}; what it printed is in the run's log: orchestrate logs"
        raise EvaluationFailed(f"evaluate.command: {shown}: {said}")
    return output.decode("utf-8", "replace")


def _wait(process: subprocess.Popen[bytes], deadline: float, stop: Stop) -> bytes | None:
    while time.monotonic() < deadline:
        stop.check()
        try:
            return process.communicate(timeout=_POLL_S)[0]
        except subprocess.TimeoutExpired:
            continue
    process.kill()
    return None
