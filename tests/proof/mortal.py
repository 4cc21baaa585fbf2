"""One attempt of a tiny run, and its export, in a process that may be killed at any moment.

What takes seconds to import is imported with this module, by the server that such processes are forked from.
"""

import sys
from pathlib import Path

from support.training import newest

from trainer.export.checkpoint import Wanted, export_checkpoint
from trainer.narration import say
from trainer.orders import read_spec
from trainer.process import _import_everything, serve
from trainer.rundir import EXIT_COMPLETE, RunDir
from trainer.serving import redirect_output
from trainer.stop import Stop

_import_everything()


def attempt(root: Path, finished: Path | None, exported: Path) -> None:
    """Train as the run directory says and export what became of it; with ``finished``, that checkpoint.

    Raises:
        SystemExit: The attempt failed; with the exit code of a training process.
    """
    run_dir = RunDir(root)
    redirect_output(run_dir.log)
    if finished is None:
        code = serve(run_dir, Stop())
        if code != EXIT_COMPLETE:
            sys.exit(code)
        finished = newest(run_dir)
    say("exporting")
    spec = read_spec(run_dir)
    wanted = Wanted(to="diffusers" if "full" in spec.base.train else "a1111", name="run")
    export_checkpoint(finished, spec, exported, wanted)
