"""The commands about what lies in the store: ``gc``, ``du`` and ``checkpoints``. Parse, call, print."""

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..usual_store import store_flag
from .options import address_option, output_option, store_option

if TYPE_CHECKING:
    from storage.garbage.collecting import Collected
    from storage.ledger import Ledger
    from storage.object_store import ObjectStore
    from storage.probe import ProbeResult

    from ..control.cluster import RemoteController
    from .cleaning import Survey

_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}

arbiter_option = address_option(
    "The sweep's Ray cluster, for stores where only its controller may write to the logs."
)


def age(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """Return a time such as 7d as seconds."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d{1,6})([smhdw])", value)
    if not found:
        raise click.BadParameter(f"{value!r}: write a whole number and s, m, h, d or w, such as 7d")
    return int(found[1]) * _UNITS_S[found[2]]


@click.command()
@click.option("--apply", is_flag=True, help="Delete. Without this, only say what would be deleted.")
@click.option(
    "--keep-last", type=click.IntRange(min=1), help="Newest checkpoints of a run to keep, not the file's."
)
@click.option(
    "--older-than",
    callback=age,
    metavar="AGE",
    help="Of sweeps that ended so long ago (7d, 12h; by the store's clock) keep only the newest, final, best "
    "and pinned checkpoints.",
)
@store_option
@arbiter_option
@output_option
def gc(
    apply: bool,
    keep_last: int | None,
    older_than: float | None,
    store_url: str,
    address: str | None,
    output: str,
) -> None:
    """Say what the store holds that nobody needs; with --apply, delete it.

    A superseded checkpoint is retired first, and its data is deleted by a later gc, or by the sweep's
    controller, when its grace period is over, or the run is: who is reading it can finish.
    """
    from storage.url import open_store

    from .cleaning import leave_out_unwritable, look, survey
    from .storage_tables import plan_json, print_plan, rows, verdict

    store = open_store(store_url)
    with _progress("reading logs") as advance:
        found = look(store, on_read=advance)
    plan = survey(store, found, keep_last=keep_last, older_than_s=older_than)
    opened = _opened(store_url, plan, apply=apply)
    unwritable = [] if opened is None or opened[1].atomic else leave_out_unwritable(plan)
    listed = rows(plan)
    _warn(found.damaged, found.inventory.uploads_hidden, len(found.inventory.unknown))
    if output == "table":
        print_plan(listed)
        click.echo(f"{store.url}: {verdict(plan, listed, applied=apply)}", err=apply)
    if opened and unwritable:
        click.echo(
            f"{' and '.join(unwritable)}: cannot be deleted from this store, where only the controller of a "
            f"sweep that goes on may retire ({opened[1].reason})",
            err=True,
        )
    done = _apply(*opened, plan, address) if opened and apply else None
    if output == "json":
        click.echo(json.dumps(plan_json(plan, listed, store.url, done), indent=1))
    if done:
        _conclude(done, store.url)
    elif listed:
        click.echo("Dry run: nothing was deleted. To delete it, give the same command with --apply", err=True)


@click.command()
@click.argument("sweep", required=False)
@store_option
@output_option
def du(sweep: str | None, store_url: str, output: str) -> None:
    """Say what takes how much room in the store, biggest first; of one SWEEP, if given."""
    from storage.garbage.usage import usage

    from ..amounts import size_text
    from .cleaning import look
    from .storage_tables import print_usage, usage_json

    store = _open(store_url, sweep)
    with _progress("reading logs") as advance:
        found = look(store, on_read=advance, only=sweep or "")
    states = {run: log.state for run, log in found.logs.items()}
    lines = usage(found.inventory, states, found.sweep_of)
    lines = [line for line in lines if sweep in (None, line.sweep)]
    _warn(found.damaged, "", 0)
    if output == "json":
        click.echo(json.dumps(usage_json(lines, store.url, found.requests, found.damaged), indent=1))
        return
    total = size_text(sum(line.size_bytes for line in lines))
    objects = sum(line.objects for line in lines)
    print_usage(lines, now=f"{store.url}: {total} in {objects} objects; {found.requests} requests made")


@click.group()
def checkpoints() -> None:
    """List, verify, download and pin the checkpoints of a run."""


@checkpoints.command("ls")
@click.argument("run")
@store_option
@output_option
def ls(run: str, store_url: str, output: str) -> None:
    """List RUN's checkpoints, oldest first."""
    from ..reports.watch import console
    from . import checkpoints_command as command
    from .storage_tables import checkpoints_table

    name, step = command.parse(run)
    found = command.Run(_open(store_url, None), name)
    listed = [row for row in command.listed(found) if step in (None, row["step"])]
    if output == "json":
        click.echo(json.dumps({"schema": 1, "run": found.run_id, "checkpoints": listed}, indent=1))
    elif listed:
        screen = console()
        with screen.capture() as shown:
            screen.print(checkpoints_table(listed))
        for line in shown.get().splitlines():
            click.echo(line.rstrip())  # rich fills the last column up with spaces
    else:
        click.echo(f"{found.run_id} has no checkpoint yet", err=True)


@checkpoints.command()
@click.argument("run", metavar="R[@STEP]")
@store_option
def verify(run: str, store_url: str) -> None:
    """Download a run's checkpoints and compare every byte's digest; exit status 1 if one is damaged."""
    from . import checkpoints_command as command

    name, step = command.parse(run)
    found = command.Run(_open(store_url, None), name)
    damaged = 0
    for checkpoint, problem in command.verify(found, step):
        damaged += bool(problem)
        click.echo(f"{found.run_id} {checkpoint.ref}: {problem or 'whole'}")
    if damaged:
        click.echo(
            "A run that resumes gives up a damaged checkpoint by itself and takes the one before it; "
            "to export another step, name it with --step.",
            err=True,
        )
        sys.exit(1)


@checkpoints.command()
@click.argument("run", metavar="R[@STEP]")
@click.option("--out", type=click.Path(path_type=Path), default=Path("checkpoints"), show_default=True)
@store_option
def pull(run: str, out: Path, store_url: str) -> None:
    """Download a checkpoint, verified: the newest, or that of STEP. Prints the folder."""
    from . import checkpoints_command as command

    name, step = command.parse(run)
    click.echo(command.pull(command.Run(_open(store_url, None), name), step, out))


@checkpoints.command()
@click.argument("run", metavar="R@STEP")
@store_option
@arbiter_option
def pin(run: str, store_url: str, address: str | None) -> None:
    """Keep the checkpoint of a step, whatever the sweep's policy says."""
    _pin(run, store_url, address, unpin=False)


@checkpoints.command()
@click.argument("run", metavar="R@STEP")
@store_option
@arbiter_option
def unpin(run: str, store_url: str, address: str | None) -> None:
    """Let the policy decide about a checkpoint again."""
    _pin(run, store_url, address, unpin=True)


COMMANDS = (gc, du, checkpoints)


def _pin(name: str, store_url: str, address: str | None, *, unpin: bool) -> None:
    from storage.probe import open_probed

    from ..control.appending import ledger_of
    from . import checkpoints_command as command

    run, step = command.parse(name)
    if step is None:
        raise click.UsageError(
            f"say which step: {run}@STEP (see: orchestrate checkpoints ls {run}{store_flag(store_url)})"
        )
    found = command.Run(_open(store_url, None), run)
    store, probed = open_probed(store_url)
    needs = not probed.atomic and not found.sweep_over
    controller = _controller(found.sweep.name, address) if needs else None
    ledger = ledger_of(store, found.run_id, controller, atomic=probed.atomic)
    click.echo(command.pin(found, step, ledger, unpin=unpin))


def _opened(store_url: str, plan: "Survey", *, apply: bool) -> "tuple[ObjectStore, ProbeResult] | None":
    """Open the store for writing logs; for a dry run only if the plan depends on it, and it lets us."""
    from storage.errors import AccessDenied
    from storage.probe import open_probed

    if not apply and not plan.contents and not any(run.retire for runs in plan.runs.values() for run in runs):
        return None
    try:
        return open_probed(store_url)
    except AccessDenied:
        if apply:
            raise
        return None


def _apply(store: "ObjectStore", probed: "ProbeResult", plan: "Survey", address: str | None) -> "Collected":
    """Carry a plan out, where this process may write, and say what is left to a controller."""
    from storage.garbage.collecting import Collected

    from ..control.appending import ledger_of
    from .cleaning import carry_out

    controllers: dict[str, RemoteController | None] = {}
    skipped: set[str] = set()

    def ledger(sweep: str, run: str) -> "Ledger | None":
        if not probed.atomic and sweep not in controllers:
            controllers[sweep] = _controller(sweep, address) if sweep else None
        found = ledger_of(store, run, controllers.get(sweep), atomic=probed.atomic)
        if found is None:
            skipped.add(sweep or run)
        return found

    done = Collected()
    with _progress("deleting") as advance:
        for number, part in enumerate(carry_out(store, plan, ledger), 1):
            done.add(part)
            advance(number, plan.steps)
            if part.failed:
                break
    if skipped:
        click.echo(
            f"of {', '.join(sorted(skipped))} nothing was retired: only its controller may write to logs on "
            f"this store, and none was found — give its cluster's --address ({probed.reason})",
            err=True,
        )
    return done


def _conclude(done: "Collected", url: str) -> None:
    """Say what was done; exit as the store's answer deserves."""
    from ..amounts import size_text
    from ..errors import AccessRefused, StoreUnreachable

    click.echo(
        f"deleted {done.objects} object{'s' * (done.objects != 1)}, {size_text(done.size_bytes)}; "
        f"retired {done.retired}",
        err=True,
    )
    if done.damaged:
        click.echo(f"left alone: {done.damaged}", err=True)
    if done.failed:
        raise StoreUnreachable(f"{url}: {done.failed} — what is left, the next gc deletes")
    if done.denied:
        raise AccessRefused(
            f"{url}: not everything could be deleted: {done.denied} — training is not affected; allow "
            "s3:DeleteObject, or wait for the objects' lock to end"
        )


def _warn(damaged: dict[str, str], uploads_hidden: str, unknown: int) -> None:
    for name, why in damaged.items():
        click.echo(f"{name} is left alone: {why}", err=True)
    if uploads_hidden:
        click.echo(f"unfinished uploads cannot be listed: {uploads_hidden}", err=True)
    if unknown:
        click.echo(f"{unknown} objects that are not ours are left alone", err=True)


def _open(store_url: str, sweep: str | None) -> "ObjectStore":
    """Open a store, having made sure that the sweep is there.

    Raises:
        Unknown: It is not.
    """
    from storage.url import open_store

    from ..grid.submission import load_submitted

    store = open_store(store_url)
    if sweep is not None:
        load_submitted(store, sweep)
    return store


def _controller(sweep: str, address: str | None) -> "RemoteController | None":
    from .session import controller_finder

    return controller_finder(sweep, address)()


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield what draws a bar on a terminal, and nothing anywhere else."""
    from rich.progress import Progress

    from ..reports.watch import console

    screen = console(stderr=True)
    with Progress(console=screen, transient=True, disable=not screen.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, of: progress.update(task, completed=done, total=of)
