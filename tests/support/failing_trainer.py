"""A training process without torch that ends badly after one step, in the way that it is told.

    python failing_trainer.py READY MODE

``READY`` is a file that appears once the process listens. ``hang``: never comes back. ``memory``: takes more
and more of it. ``type:message``: says that this was the exception, exit 1.
"""

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from support.light_trainer import PAUSE_S, train

from trainer.rundir import RunDir, append_event


def main(ready: Path, mode: str) -> int:
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    ready.touch()
    run_dir = RunDir(Path(json.loads(sys.stdin.readline())["run_dir"]))
    log = os.open(run_dir.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    while not run_dir.start.exists():
        os.utime(run_dir.alive)
        time.sleep(PAUSE_S)
    train(run_dir, 1)
    match mode.partition(":"):
        case ("hang", _, _):
            wait_for_what_never_comes()
        case ("memory", _, _):
            taken = []
            while True:
                taken.append(bytearray(b"x" * 10_000_000))
        case (kind, _, message):
            append_event(
                run_dir.events, "error", type=kind, message=message, hint="", memory_bytes=16_000_000
            )
    return 1


def wait_for_what_never_comes() -> None:
    threading.Event().wait()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
