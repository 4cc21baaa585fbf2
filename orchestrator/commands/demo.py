"""The demo: a small real sweep on this machine that loses a node half way and ends with the same bits.

Everything is real: a local Ray cluster of two worker nodes, a folder as the store, a base model that never
saw a nine, real images of nines, SIGKILL for a whole node. Afterwards the run that was interrupted is trained
once more without any interruption, and the two adapters are compared byte for byte.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click

from storage import layout
from storage.checkpoints import CheckpointStore
from storage.log import run_log
from storage.object_store import ObjectStore
from storage.probe import open_probed

from ..errors import OrchestrateError
from ..grid.submission import submit
from ..grid.sweep import PlannedRun, Sweep, load
from ..launching import launch
from ..on_ray import local_ray
from ..reports.view import RunView, Status, best, read_states, rows
from ..reports.watch import watch
from ..reports.why import interruptions, why
from .contact_sheet import contact_sheet
from .exporting import export_run

DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits"
ADAPTER = "nine.safetensors"
"""The best run's, for diffusers: what the examples of ``orchestrate lora`` begin with."""


def run_demo(out: Path, *, kill: bool = True) -> None:
    """Run the demo in the folder ``out`` and print its figures as one JSON line.

    Raises:
        OrchestrateError: Something that the demo promises does not hold.
    """
    began = time.monotonic()
    out = _fresh(out)
    sweep = load(DIGITS / "grid.yaml", overrides=[f"storage.url=file://{out / 'store'}"])
    store, _ = open_probed(sweep.storage.url)
    submit(sweep, store)
    os.environ["ORCHESTRATE_HOME"] = str(out / "home")
    _say(f"a local Ray cluster: two worker nodes, and {len(sweep.runs)} runs for them")
    cluster = local_ray.start(nodes=2, cpus=1)
    try:
        launch.connect(cluster.address)
        launch.start(sweep, sweep.storage.url, arbitrated=False)
        killer = _NodeKiller(cluster) if kill else None
        views = watch(
            sweep, store, controller=lambda: launch.find_controller(sweep.name), every_s=0.5, on_look=killer
        )
    finally:
        local_ray.stop(cluster)
    _print_json(_conclude(out, sweep, store, views, killer), began)


class _NodeKiller:
    """Kills the node of the first run that has something to lose, once."""

    def __init__(self, cluster: local_ray.LocalRay) -> None:
        self._cluster = cluster
        self.killed: str | None = None

    def __call__(self, views: list[RunView]) -> None:
        for view in views:
            lost = view.step - view.committed_step
            half_way = view.max_steps // 4 < view.step < view.max_steps * 3 // 4
            if self.killed is None and view.node and view.status is Status.RUNNING and half_way and lost > 2:
                self.killed = view.run
                count = local_ray.kill_node(self._cluster, view.node)
                _say(f"SIGKILL to {view.node} and its {count} processes, {view.run} is at step {view.step}")
                local_ray.add_node(self._cluster)


def _conclude(
    out: Path, sweep: Sweep, store: ObjectStore, views: list[RunView], killer: _NodeKiller | None
) -> dict[str, Any]:
    failed = [f"{v.run}: {v.status} {v.detail}" for v in views if v.status is not Status.SUCCEEDED]
    if failed:
        raise OrchestrateError("the demo's sweep did not succeed: " + "; ".join(failed))
    winner = best(sweep, rows(sweep, read_states(sweep, store)))
    if winner is None or winner.metric is None:
        raise OrchestrateError("no run of the demo's sweep reports its score")
    figures: dict[str, Any] = {"runs": len(views), "kills": 0, "lost_steps": 0}
    if killer:
        if killer.killed is None:
            raise OrchestrateError("every run ended before a node could be killed")
        figures |= _after_the_kill(out, sweep, store, killer.killed)
    run = sweep.run(winner.run)
    _say("what the base model draws, and what the best adapter draws")
    base_samples = _sample_base(out, run)
    best_samples = _stored_samples(out, store, run)
    export = export_run(store, run, step=None, form="diffusers", out=out / "export", force=True)
    adapter = shutil.copyfile(export, out / ADAPTER)
    grid = contact_sheet({"base model": base_samples, f"best: {winner.run}": best_samples}, out / "grid.png")
    base_score, best_score = _score(run, base_samples), _score(run, best_samples)
    _check_learned(base_score, best_score)
    return figures | {
        "base_score": round(base_score["score"], 4),
        "best_score": round(best_score["score"], 4),
        "best_new_digit": round(best_score["new_digit"], 4),
        "best_old_digits": round(best_score["old_digits"], 4),
        "best_run": winner.run,
        "export": str(adapter),
        "grid_png": str(grid),
    }


def _check_learned(base: dict[str, float], adapter: dict[str, float]) -> None:
    """The base fails on the new digit, the adapter does not, and the old digits still work."""
    if not (base["new_digit"] < 0.5 < adapter["new_digit"] and adapter["old_digits"] > 0.8):
        raise OrchestrateError(f"the adapter did not learn the digit: base {base}, adapter {adapter}")


def _after_the_kill(out: Path, sweep: Sweep, store: ObjectStore, killed: str) -> dict[str, Any]:
    """Explain what the kill cost, and show that it changed nothing."""
    states = read_states(sweep, store)
    run = sweep.run(killed)
    click.echo(f"{killed}: {why(states[killed], run.spec.base.max_train_steps)}", err=True)
    _say(f"training {killed} once more, undisturbed, to compare")
    same = _adapter_digest(store, killed, out / "a") == _undisturbed_digest(out, run)
    if not same:
        raise OrchestrateError(f"{killed}: the interrupted run's adapter differs from the undisturbed one's")
    _say("the two adapters are the same, byte for byte")
    lost = sum(cut.lost_steps for state in states.values() for cut in interruptions(state))
    return {"kills": 1, "lost_steps": lost, "bit_identical": same}


def _undisturbed_digest(out: Path, run: PlannedRun) -> str:
    calm = out / "undisturbed"
    spec = out / "undisturbed.json"
    spec.write_text(run.spec.model_dump_json())
    arguments = ["--spec", str(spec), "--store", f"file://{calm}", "--run-id", run.run_id, "--threads", "1"]
    _trainer("run", *arguments)
    return _adapter_digest(open_probed(f"file://{calm}")[0], run.run_id, out / "b")


def _adapter_digest(store: ObjectStore, run_id: str, scratch: Path) -> str:
    log = run_log(store, run_id)
    checkpoint, path = CheckpointStore(store, run_id, log).fetch_newest(log.refresh(), scratch)
    if checkpoint is None or path is None or not checkpoint.final:
        raise OrchestrateError(f"{run_id} has no final checkpoint in {store.url}")
    return hashlib.sha256((path / "adapter.safetensors").read_bytes()).hexdigest()


def _sample_base(out: Path, run: PlannedRun) -> Path:
    spec = out / "best.json"
    spec.write_text(run.spec.model_dump_json())
    _trainer("sample", "--spec", str(spec), "--out", str(out / "samples-base"))
    return out / "samples-base"


def _stored_samples(out: Path, store: ObjectStore, run: PlannedRun) -> Path:
    target = out / "samples-best"
    target.mkdir()
    for info in store.list(layout.samples_prefix(run.run_id, run.spec.base.max_train_steps)):
        store.download(info.key, target / info.key.rsplit("/", 1)[-1])
    return target


def _score(run: PlannedRun, samples: Path) -> dict[str, float]:
    assert run.spec.evaluate is not None
    words = [word.replace("{samples}", str(samples)) for word in run.spec.evaluate.command]
    words[0] = sys.executable if words[0] == "python" else words[0]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return {name: float(value) for name, value in json.loads(done.stdout.strip().splitlines()[-1]).items()}


def _trainer(*arguments: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "trainer", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode != 0:
        raise OrchestrateError(f"python -m trainer {arguments[0]} failed: {done.stderr.strip()}")


def _fresh(out: Path) -> Path:
    """Make the output folder, removing what an earlier demo left, and nothing else."""
    if not (DIGITS / "grid.yaml").exists():
        raise OrchestrateError(f"the demo's example is not at {DIGITS}: run it from a clone of the project")
    marker = out / "made-by-orchestrate-demo"
    if out.exists() and any(out.iterdir()) and not marker.exists():
        raise OrchestrateError(f"{out} is not empty and not a demo's: give another --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    marker.touch()
    return out.resolve()


def _say(text: str) -> None:
    click.echo(f"» {text}", err=True)


def _print_json(figures: dict[str, Any], began: float) -> None:
    click.echo(f"look at {figures['grid_png']}", err=True)
    click.echo(
        f"the best adapter is {figures['export']}: `orchestrate lora --help` says what to do with it",
        err=True,
    )
    click.echo(json.dumps(figures | {"seconds": round(time.monotonic() - began, 1)}))
