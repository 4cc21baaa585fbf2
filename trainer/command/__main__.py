"""The process that plays a program: ``python -m trainer.command``, for ``trainer.process`` where a run has a
``command``.

Started by itself it reads its run directory from stdin, as the training process does; a spare training
process that is given such a run becomes this one, and names the run directory as an argument.
"""

import json
import os
import signal
import sys
from pathlib import Path

from ..orphan import die_when_abandoned, die_with_stdin
from ..rundir import RunDir
from ..serving import guarded, read_line, redirect_output
from ..stop import Stop
from .play import play


def main() -> int:
    die_when_abandoned()
    stop = Stop()
    stop.exit_at_once = True
    stop.listen()
    signal.signal(signal.SIGUSR1, lambda number, frame: None)  # until there is a program to ask
    if len(sys.argv) > 1:
        run_dir = RunDir(Path(sys.argv[1]))
    else:
        line = read_line()
        if line is None:
            return 0
        run_dir = RunDir(Path(json.loads(line)["run_dir"]))
        redirect_output(run_dir.log)
    die_with_stdin()
    return guarded(run_dir, lambda: play(run_dir, stop))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
