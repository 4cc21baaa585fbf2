"""What a training process writes into its log, for a person: a line at each turn, none for each step.

Programs read events.jsonl; this is what ``orchestrate logs`` shows.
"""

import contextlib
import os
from datetime import UTC, datetime


def say(text: str) -> None:
    """Write a line to standard output, the run's log. On a full disk it is lost: training goes on."""
    line = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {text}\n"
    with contextlib.suppress(OSError):
        os.write(1, line.encode(errors="replace"))  # sys.stdout would keep it, and fail again at the end
