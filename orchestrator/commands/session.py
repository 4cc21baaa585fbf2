"""What commands share: working on a sweep until it is over, watching it, and what is told of it."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table
from rich.text import Text

from storage.object_store import ObjectStore
from storage.probe import ProbeResult
from storage.url import open_store

from ..control.cluster import NoCluster, RemoteController
from ..control.controller import Controller
from ..errors import NoAnswer, PreflightFailed
from ..grid.sweep import Sweep, load
from ..launching import launch, preflight
from ..launching.data import surveys
from ..on_ray import local_ray
from ..reports.view import OVER, RunView, Status, best, described, read_rows
from ..reports.watch import console, table, watch
from ..usual_store import store_flag

if TYPE_CHECKING:
    from ..on_ray.controller_client import ControllerClient

EXIT_RUNS_FAILED = 100
EXIT_DETACHED = 130


def examined(file: Path, overrides: Sequence[str]) -> Sweep:
    """Read a sweep file and check it with everything that it names, telling what its data sets hold.

    Raises:
        InvalidFile, PreflightFailed: With all that is wrong.
    """
    planned = load(file, overrides=overrides)
    problems = preflight.check(planned, open_store(planned.storage.url))
    for line in surveys(run.spec for run in planned.runs if run.spec.command is None):
        click.echo(line, err=True)
    preflight.refuse(problems)
    for warning in problems:
        click.echo(str(warning), err=True)
    return planned


def refuse_unrunnable(
    sweep: Sweep, store: ObjectStore, probed: ProbeResult, *, address: str | None, insecure: bool
) -> None:
    """Refuse what no controller could work on, before anything of the sweep is stored.

    The connection ends again: storing may outlast a local cluster on which nothing runs.

    Raises:
        PreflightFailed: No cluster answers, no node of it has what a run needs, or the store will not do.
    """
    launch.refuse_scoped(sweep, store.url, arbitrated=not probed.atomic)
    launch.connect(address, insecure=insecure)
    try:
        launch.check_resources(sweep)
    finally:
        local_ray.disconnect()


def work_on(
    sweep: Sweep,
    store: ObjectStore,
    probed: ProbeResult,
    *,
    address: str | None,
    detach: bool,
    insecure: bool,
) -> None:
    """Start the sweep's controller if any run is left to do, and watch unless detached."""
    views = read_rows(sweep, store)
    if all(view.status in OVER for view in views):
        Controller(sweep, store, NoCluster()).tick()  # deletes what a controller that was killed left behind
        if cancelled := sum(view.status is Status.CANCELLED for view in views):
            click.echo(
                f"{sweep.name} was cancelled ({cancelled} of {len(views)} runs) and stays so — "
                "to train them, submit the file under another name, with --name",
                err=True,
            )
        conclude(sweep, views)
        return
    how = "agents append to the logs" if probed.atomic else f"{probed.reason}; only the controller appends"
    if sweep.storage.credentials == "scoped" and probed.atomic:
        how = "nodes hold no credentials; the controller signs and verifies what they store"
    click.echo(f"store: {store.url}: {how}{probed.when}", err=True)
    where = launch.connect(address, insecure=insecure)
    if missing := launch.missing_resources(sweep):  # workers may yet have to join a head that came back
        click.echo(f"{missing.message}; the runs wait for such a node", err=True)
    if warning := launch.unseen_folder(store):
        click.echo(str(warning), err=True)
    launch.start(sweep, store.url, arbitrated=not probed.atomic)
    click.echo(f"sweep {sweep.name} runs on {where}", err=True)
    if detach:
        _useful_commands(sweep.name, store.url)
    else:
        conclude(sweep, watched(sweep, store, lambda: launch.find_controller(sweep.name)))


def watched(
    sweep: Sweep, store: ObjectStore, controller: Callable[[], RemoteController | None]
) -> list[RunView]:
    """Show the sweep until it is over. Ctrl-C ends the showing, with its own exit code, and nothing else."""
    try:
        return watch(sweep, store, controller=controller)
    except KeyboardInterrupt:
        click.echo("\nDetached. The sweep goes on.", err=True)
        _useful_commands(sweep.name, store.url)
        sys.exit(EXIT_DETACHED)


def conclude(sweep: Sweep, views: list[RunView]) -> None:
    """Print the table, the best run and why others failed; exit with 100 if any did."""
    console().print(table(sweep, views))
    if winner := best(sweep, views):
        click.echo(best_line(sweep, winner))
    for view in views:
        if view.detail:
            click.echo(f"run {view.run} {view.status.lower()}: {view.detail}", err=True)
    if any(view.status is Status.FAILED for view in views):
        sys.exit(EXIT_RUNS_FAILED)


def best_line(sweep: Sweep, winner: RunView) -> str:
    return f"best by {sweep.metric.name if sweep.metric else 'metric'}: {winner.run} ({winner.metric:.4f})"


def controller_finder(name: str, address: str | None) -> "Callable[[], ControllerClient | None]":
    """Return a function that finds the sweep's controller, without starting any cluster."""
    find = controllers(address)
    return lambda: find(name)


def controllers(address: str | None) -> "Callable[[str], ControllerClient | None]":
    """Return a function that finds a sweep's controller by its name, without starting any cluster.

    Without a cluster the store alone must do: that is said, and nothing is found. This process connects once.
    """
    cluster = local_ray.find()
    target = address or (cluster.address if cluster else None)
    if target is None:
        return lambda name: None
    try:
        launch.connect(target, insecure=True)
    except (PreflightFailed, NoAnswer) as error:
        said = error.problems[0] if isinstance(error, PreflightFailed) else str(error)
        click.echo(f"{said}; showing what the store knows", err=True)
        return lambda name: None
    return launch.find_controller


def show_plan(sweep: Sweep) -> None:
    """Print the runs of a sweep before it is launched."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("RUN", "PARAMS", "STEPS"):
        shown.add_column(heading)
    for run in sweep.runs:
        shown.add_row(run.run_id, Text(described(run.parameters)), str(run.spec.max_steps))
    console(stderr=True).print(shown)
    left_out = f", {sweep.left_out} left out by run_cap" if sweep.left_out else ""
    click.echo(f"{len(sweep.runs)} runs{left_out}; store {sweep.storage.url}", err=True)


def _useful_commands(name: str, store_url: str) -> None:
    flag = store_flag(store_url)
    commands = {
        f"status {name} -w{flag}": "watch it again",
        f"explain {name}/0{flag}": "why a run waits, or is where it is",
        f"why {name}/0{flag}": "why a run was interrupted",
        f"cancel {name}{flag}": "stop it; checkpoints stay",
    }
    width = max(map(len, commands))
    for command, purpose in commands.items():
        click.echo(f"  orchestrate {command:<{width}}     {purpose}", err=True)
