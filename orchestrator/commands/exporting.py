"""From a committed checkpoint to a verified LoRA file. The conversion runs in a process of the trainer's.

What a foreign command made is copied as it is, unopened.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from storage import layout
from storage.checkpoints import CheckpointStore
from storage.errors import NotFound
from storage.local import MANIFEST
from storage.log import run_log
from storage.object_store import ObjectStore
from storage.url import open_store

from ..errors import InvalidFile, OrchestrateError, Problem, Unknown
from ..grid.submission import find_run
from ..grid.sweep import PlannedRun


def export_run(
    store: ObjectStore,
    run: PlannedRun,
    *,
    step: int | None = None,
    form: str = "diffusers",
    out: Path,
    force: bool = False,
    options: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Export a run's newest checkpoint, or that of a step, and return the file of weights.

    Args:
        form: For whom; see ``trainer.export.bundle``.
        options: Further ones of ``python -m trainer export``, such as ``--dtype fp16``.
        say: Is told what was verified, and how the adapter is called in a prompt.

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
        if (samples := _fetched_samples(store, run.run_id, wanted, Path(scratch) / "samples")) is not None:
            arguments += ["--samples", str(samples)]
        if "--name" not in options:
            arguments += ["--name", f"{run.run_id}-step{wanted:08d}"]
        *said, written = trainer_lines("export", *arguments, *options)
    for line in said:
        say(line)
    return Path(written)


def fetched_run(store_url: str, name: str, step: int | None, scratch: Path) -> tuple[Path, Path]:
    """Fetch a run's newest checkpoint, or that of a step, and return its folder and a file with its spec.

    Raises:
        Unknown: There is no such run, file or checkpoint.
        InvalidFile: It was trained by a command of its own.
    """
    store = open_store(store_url)
    try:
        sweep, run_id = find_run(store, name, "file, folder or run")
    except Unknown as error:
        raise Unknown(f"{name} is no file or folder here; in {store.url}: {error}") from error
    run = sweep.run(run_id)
    if run.spec.command is not None:
        message = f"{run_id} was trained by a command of its own"
        hint = "export it, then name the adapter's file, and its --base"
        raise InvalidFile([Problem(code="E2702", message=message, hint=hint)])
    log = run_log(store, run_id)
    state = log.refresh()
    if not state.stored:
        raise Unknown(f"{run_id} has no checkpoint yet")
    checkpoints = CheckpointStore(store, run_id, log)
    try:
        wanted = checkpoints.find(state, state.stored[-1].step if step is None else step).step
    except NotFound as error:
        raise Unknown(str(error)) from error
    _, path = checkpoints.fetch_step(state, wanted, scratch)
    spec = scratch / "spec.json"
    spec.write_text(run.spec.model_dump_json())
    return path, spec


def trainer_lines(*arguments: str) -> list[str]:
    """Run ``python -m trainer`` and return the lines that it prints.

    Raises:
        OrchestrateError: It failed, with what it said.
    """
    command = [sys.executable, "-m", "trainer", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        foreseen = done.returncode > 1 and lines and "Traceback" not in done.stderr
        why = lines[-1] if foreseen else "\n".join(lines)
        raise OrchestrateError(why or f"the trainer's {arguments[0]} failed with exit code {done.returncode}")
    return done.stdout.strip().splitlines()


def _fetched_samples(store: ObjectStore, run_id: str, step: int, folder: Path) -> Path | None:
    """Fetch the run's newest sample images up to a step into a new folder; None if there are none."""
    found: dict[int, dict[str, str]] = {}
    for info in store.list(layout.samples_prefix(run_id)):
        parsed = layout.parse_sample(info.key)
        if parsed and parsed[1] <= step and "/" not in parsed[2]:
            found.setdefault(parsed[1], {})[parsed[2]] = info.key
    if not found:
        return None
    folder.mkdir()
    for name, key in found[max(found)].items():
        store.download(key, folder / name)
    return folder
