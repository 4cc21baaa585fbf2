"""``orchestrate``: parse, call, print. What a command needs is imported when it runs: ``--help`` is instant.

Data goes to stdout, talk to stderr. Exit codes are in ``errors``; 100: the sweep ended with failed runs,
130: detached by Ctrl-C, the sweep goes on.
"""

import json
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from .commands import generating, lora, operating_commands, starting, storage_commands, supervise_command
from .commands.options import address_option, output_option, store_option
from .usual_store import DEFAULT_STORE

cluster_option = address_option(
    "The Ray cluster, e.g. auto or 10.0.0.1:6379. By default one on this machine, started when needed."
)
insecure_option = click.option(
    "--insecure", is_flag=True, help="Use a cluster elsewhere although RAY_AUTH_MODE=token is not set."
)


FORMS = ("diffusers", "kohya", "comfyui", "a1111", "hf", "dir")
"""For whom an adapter is exported: see ``trainer.export.bundle``."""

LAUNCHING = ("sweep", "resume")
"""Whoever calls one of these and sees an error wants to know whether anything runs."""


class Commands(click.Group):
    """A group that turns every foreseen error into one message and its exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        from storage.errors import StorageError

        from .errors import OrchestrateError, ProblemsFound, format_problems, translated

        try:
            return super().invoke(ctx)
        except ProblemsFound as error:
            launches = ctx.invoked_subcommand in LAUNCHING
            verdict = "Nothing was launched." if launches else ""
            _fail(format_problems(error.problems, verdict), error.exit_code)
        except OrchestrateError as error:
            _fail(str(error), error.exit_code)
        except StorageError as error:
            foreseen = translated(error, "the store")
            _fail(str(foreseen), foreseen.exit_code)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="orchestrate-loras", prog_name="orchestrate")
def main() -> None:
    """Train many LoRAs on GPUs that can vanish at any second."""


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Write over a value of the file."
)
@click.option(
    "--hollow-below",
    type=float,
    metavar="GB",
    help="Find the cut (base.hollow) with which training needs less.",
)
def plan(file: Path, overrides: tuple[str, ...], hollow_below: float | None) -> None:
    """Tell what the runs of a sweep file will need of a GPU's memory, before one is rented.

    Needs the configuration of the base model, no weights and no GPU; half a minute for each kind of run.
    """
    from .commands.planning import planned_memory
    from .grid.sweep import load

    for line in planned_memory(load(file, overrides=overrides), hollow_below):
        click.echo(line)


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Write over a value of the file."
)
@click.option(
    "--all", "everything", is_flag=True, help="Also what it names: images, models, programs, store."
)
def validate(file: Path, overrides: tuple[str, ...], everything: bool) -> None:
    """Check a sweep file, without looking at anything that it names."""
    from .grid.sweep import validate as check

    draft = check(file, overrides=overrides)
    if everything:
        from .commands.session import examined

        examined(file, overrides)
    count = len(draft.cells)
    click.echo(f"{file}: no mistakes; sweep {draft.name}, {count} {'run' if count == 1 else 'runs'}")


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Write over a value of the file."
)
@click.option("--name", help="Name of the sweep, instead of the file's.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("-d", "--detach", is_flag=True, help="Return once the sweep runs.")
@click.option("--dry-run", is_flag=True, help="Check everything and show the runs, launch nothing.")
@cluster_option
@insecure_option
def sweep(
    file: Path,
    overrides: tuple[str, ...],
    name: str | None,
    yes: bool,
    detach: bool,
    dry_run: bool,
    address: str | None,
    insecure: bool,
) -> None:
    """Train every run of a sweep file. The same file again resumes the sweep, or shows that it is done."""
    from storage.probe import open_probed

    from .commands.session import examined, refuse_unrunnable, show_plan, work_on
    from .grid.inputs import shown_upload
    from .grid.submission import is_new, submit

    planned = examined(file, (*overrides, f"name={name}") if name else overrides)
    show_plan(planned)
    if dry_run:
        click.echo("Dry run: nothing was launched.", err=True)
        return
    if not yes and sys.stdin.isatty():
        click.confirm("Proceed?", default=True, abort=True, err=True)
    store, probed = open_probed(planned.storage.url)
    if is_new(planned, store):
        refuse_unrunnable(planned, store, probed, address=address, insecure=insecure)
    with shown_upload(planned, store) as on_sent:
        created = submit(planned, store, on_sent)
    if not created:
        click.echo(f"{planned.name} was submitted before, unchanged.", err=True)
    work_on(planned, store, probed, address=address, detach=detach, insecure=insecure)


@main.command()
@click.argument("name")
@click.option("-d", "--detach", is_flag=True, help="Return once the sweep runs.")
@store_option
@cluster_option
@insecure_option
def resume(name: str, detach: bool, store_url: str, address: str | None, insecure: bool) -> None:
    """Go on with a sweep, with nothing but its store. Safe at any time, also when it is running."""
    from storage.probe import open_probed
    from storage.url import open_store

    from .commands.session import work_on
    from .grid.submission import load_submitted

    found = load_submitted(open_store(store_url), name)  # first: probing writes
    store, probed = open_probed(store_url)
    work_on(found, store, probed, address=address, detach=detach, insecure=insecure)


@main.command()
@click.argument("name")
@click.option("-w", "--watch", "watching", is_flag=True, help="Keep showing until every run is over.")
@output_option
@store_option
@cluster_option
def status(name: str, watching: bool, output: str, store_url: str, address: str | None) -> None:
    """Show where the runs of a sweep are."""
    from storage.url import open_store

    from .commands.session import controller_finder, watched
    from .grid.submission import load_submitted
    from .reports.view import as_json
    from .reports.watch import Watcher, console, table

    store = open_store(store_url)
    found = load_submitted(store, name)
    controller = controller_finder(found.name, address)
    if watching:
        watched(found, store, controller)
    views = Watcher(found, store).look(controller())
    if output == "json":
        click.echo(json.dumps(as_json(found, views)))
    else:
        console().print(table(found, views))


@main.command()
@click.argument("run")
@click.option("--timeline", "with_timeline", is_flag=True, help="Then every record of the run's log.")
@store_option
def why(run: str, with_timeline: bool, store_url: str) -> None:
    """Say in plain words why RUN was interrupted, and what it cost."""
    from storage.log import run_log
    from storage.url import open_store

    from .grid.submission import find_run
    from .reports.why import timeline
    from .reports.why import why as explained

    store = open_store(store_url)
    found, run_id = find_run(store, run)
    log = run_log(store, run_id)
    state = log.refresh()
    max_steps = found.run(run_id).spec.max_steps
    click.echo(f"{run_id}: {explained(state, max_steps, found.resources.price_per_hour)}")
    if with_timeline:
        click.echo("\n".join(timeline(log.entries())))


@main.command()
@click.argument("run")
@output_option
@store_option
def describe(run: str, output: str, store_url: str) -> None:
    """Print all that is settled about RUN: spec, inputs, attempts, and how often it saves itself and why."""
    from storage.url import open_store

    from .grid.submission import find_run
    from .reports.describing import describe as described
    from .reports.describing import text

    store = open_store(store_url)
    found, run_id = find_run(store, run)
    facts = described(store, found, run_id)
    click.echo(json.dumps(facts) if output == "json" else "\n".join(text(facts)))


@main.command()
@click.argument("name")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@store_option
@cluster_option
def cancel(name: str, yes: bool, store_url: str, address: str | None) -> None:
    """Stop a sweep, or one run of it. Running trainers save themselves first; logs and checkpoints stay."""
    from storage.probe import open_probed
    from storage.url import open_store

    from .commands.cancelling import ask_to_cancel
    from .commands.session import controller_finder
    from .grid.submission import find_run, load_submitted, sweep_names

    store = open_store(store_url)
    if name in sweep_names(store):
        found = load_submitted(store, name)
        run_ids = [run.run_id for run in found.runs]
    else:
        found, run_id = find_run(store, name, "sweep or run")
        run_ids = [run_id]
    if not yes and sys.stdin.isatty():
        click.confirm(f"Cancel {len(run_ids)} run(s) of {found.name}?", default=False, abort=True, err=True)
    controller = controller_finder(found.name, address)()
    store, probed = open_probed(store_url)
    for run_id, outcome in ask_to_cancel(store, run_ids, controller, atomic=probed.atomic).items():
        click.echo(f"{run_id}: {outcome}")


@main.command()
@click.argument("run")
@click.option(
    "--attempt", type=click.IntRange(min=1), help="Which attempt; by default the newest that wrote anything."
)
@click.option("--previous", is_flag=True, help="The attempt before the newest one.")
@click.option(
    "-n",
    "--tail",
    type=click.IntRange(min=0),
    default=200,
    show_default=True,
    help="Lines from the end; 0: all.",
)
@click.option("--events", is_flag=True, help="The trainer's events (JSON lines) instead of its output.")
@store_option
def logs(run: str, attempt: int | None, previous: bool, tail: int, events: bool, store_url: str) -> None:
    """Print what a run's trainer wrote, also when its node is gone."""
    from storage.log import run_log
    from storage.url import open_store

    from .errors import Unknown
    from .grid.submission import find_run
    from .reports.trainer_logs import read_lines

    if previous and attempt:
        raise click.UsageError("--previous and --attempt both say which attempt: give one of them")
    store = open_store(store_url)
    _, run_id = find_run(store, run)
    if previous and (attempt := run_log(store, run_id).refresh().attempt - 1) < 1:
        raise Unknown(f"{run_id} has no attempt before its newest one")
    for line in read_lines(store, run_id, attempt=attempt, events=events, tail=tail):
        click.echo(line)


@main.command()
@click.argument("name")
@click.option("--best", is_flag=True, help="The best run of the sweep NAME, by its metric.")
@click.option("--step", type=click.IntRange(min=0), help="A step's checkpoint instead of the newest.")
@click.option(
    "--to", "form", type=click.Choice(FORMS), default="diffusers", show_default=True, help="Who reads it."
)
@click.option("--name", "title", help="What the adapter is called; by default after run and step.")
@click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp32", show_default=True)
@click.option(
    "--metadata",
    type=click.Choice(["minimal", "full", "none"]),
    default="minimal",
    show_default=True,
    help="What the file tells; full: also captions and paths.",
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("exports"), show_default=True)
@click.option("--force", is_flag=True, help="Write over an export that is there.")
@store_option
def export(
    name: str,
    best: bool,
    step: int | None,
    form: str,
    title: str | None,
    dtype: str,
    metadata: str,
    out: Path,
    force: bool,
    store_url: str,
) -> None:
    """Write a run's adapter as others load it, with what they show beside it, and verify that they do."""
    from storage.url import open_store

    from .commands.exporting import export_run
    from .commands.session import best_line
    from .errors import Unknown
    from .grid.submission import find_run, load_submitted
    from .reports.view import best as best_of
    from .reports.view import read_rows

    store = open_store(store_url)
    if best:
        found = load_submitted(store, name)
        winner = best_of(found, read_rows(found, store))
        if winner is None:
            raise Unknown(f"{name}: no run that succeeded reports the sweep's metric")
        run_id = winner.run
        click.echo(best_line(found, winner), err=True)
    else:
        found, run_id = find_run(store, name)
    options = ["--dtype", dtype, "--metadata", metadata, *(["--name", title] if title else [])]
    written = export_run(
        store,
        found.run(run_id),
        step=step,
        form=form,
        out=out,
        force=force,
        options=options,
        say=lambda line: click.echo(line, err=True),
    )
    click.echo(written)


@main.command()
@click.argument("name")
@click.option("--to", type=click.Choice(["tensorboard", "wandb"]), required=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("tracked"), show_default=True)
@store_option
def track(name: str, to: str, out: Path, store_url: str) -> None:
    """Write what a sweep's runs, or one run, measured for TensorBoard, or for W&B to sync.

    Called again, it goes on where it left off.
    """
    from storage.url import open_store

    from .commands.tracking import track_run
    from .grid.submission import find_run, load_submitted, sweep_names

    store = open_store(store_url)
    if name in sweep_names(store):
        found = load_submitted(store, name)
        runs = found.runs
    else:
        found, run_id = find_run(store, name, "sweep or run")
        runs = (found.run(run_id),)
    for run in runs:
        steps = track_run(store, found.name, run, to=to, out=out)
        click.echo(f"{run.run_id}: {steps} new steps in {out}")


@main.command()
@click.option(
    "--storage",
    "--store",
    "store_url",
    envvar="ORCHESTRATE_STORE",
    default=DEFAULT_STORE,
    show_default=True,
    help="The store to examine. [env: ORCHESTRATE_STORE]",
)
@click.option(
    "--checkpoint-mb",
    type=click.IntRange(min=1),
    default=300,
    show_default=True,
    help="Size of a checkpoint: two must fit on this machine's disk.",
)
@output_option
def doctor(store_url: str, checkpoint_mb: int, output: str) -> None:
    """Find out whether a store will do: rights, create-only, checksums, clock, speed."""
    from .commands.doctor import run_doctor

    sys.exit(run_doctor(store_url, checkpoint_bytes=checkpoint_mb * 1_000_000, as_json=output == "json"))


@main.command()
@click.option("--kill/--no-kill", default=True, show_default=True, help="Kill a node while it trains.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo"), show_default=True)
def demo(kill: bool, out: Path) -> None:
    """Train a small real sweep here, lose a node half way, and finish as if nothing had happened."""
    from .commands.demo import run_demo

    run_demo(out, kill=kill)


for command in (
    *storage_commands.COMMANDS,
    *operating_commands.COMMANDS,
    supervise_command.supervise,
    starting.init,
    generating.generate,
    lora.lora,
):
    main.add_command(command)


def _fail(message: str, code: int) -> NoReturn:
    click.echo(message, err=True)
    sys.exit(code)
