"""From a committed checkpoint to a verified LoRA file. The conversion runs in a process of the trainer's.

What a foreign command made is copied as it is, unopened.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from storage.checkpoints import CheckpointStore
from storage.errors import NotFound
from storage.local import MANIFEST
from storage.log import run_log
from storage.object_store import ObjectStore

from ..errors import InvalidFile, OrchestrateError, Problem, Unknown
from ..grid.sweep import PlannedRun


def export_run(
    store: ObjectStore, run: PlannedRun, *, step: int | None, form: str, out: Path, force: bool
) -> Path:
    """Export a run's newest checkpoint, or that of a step, and return the file.

    Raises:
        InvalidFile: The target is there and ``force`` is not given.
        Unknown: There is no such checkpoint.
        OrchestrateError: The file that was written does not verify.
    """
    log = run_log(store, run.run_id)
    state = log.refresh()
    checkpoints = CheckpointStore(store, run.run_id, log)
    if not state.stored:
        raise Unknown(f"{run.run_id} has no checkpoint yet: export it after its first commit")
    try:
        wanted = checkpoints.find(state, state.stored[-1].step if step is None else step).step
    except NotFound as error:
        raise Unknown(str(error)) from error
    is_foreign = run.spec.command is not None
    if is_foreign and form != "diffusers":
        message = f"{run.run_id} was trained by a command of its own: its files are copied as they are"
        raise InvalidFile([Problem(code="E2702", message=message, hint="leave --to out")])
    target = out / f"{run.run_id}-step{wanted:08d}-{'files' if is_foreign else form}"
    if target.exists() and not force:
        hint = "give --force to write over it, or another --out"
        raise InvalidFile([Problem(code="E2701", message=f"{target} is there already", hint=hint)])
    with tempfile.TemporaryDirectory() as scratch:
        _, path = checkpoints.fetch_step(state, wanted, Path(scratch))
        if is_foreign:
            (path / MANIFEST).unlink()
            shutil.copytree(path, target, dirs_exist_ok=True)
            return target
        spec = Path(scratch) / "spec.json"
        spec.write_text(run.spec.model_dump_json())
        arguments = ["--checkpoint", str(path), "--spec", str(spec), "--out", str(target), "--to", form]
        done = subprocess.run(
            [sys.executable, "-m", "trainer", "export", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        raise OrchestrateError(f"{target}: {done.stderr.strip() or 'the export failed'}")
    return Path(done.stdout.strip().splitlines()[-1])
