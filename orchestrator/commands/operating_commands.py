"""The commands of who keeps a sweep going: events, explain, nodes, drain. Parse, call, print."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click

from .options import address_option, output_option, store_option
from .storage_commands import age

if TYPE_CHECKING:
    from storage.object_store import ObjectStore

    from ..control.cluster import RemoteController
    from ..reports.nodes import NodeView

sweeps_cluster_option = address_option(
    "The sweep's Ray cluster; by default one on this machine, if it is there."
)


@click.command()
@click.argument("name")
@click.option("-f", "--follow", is_flag=True, help="Go on until every run is over, or Ctrl-C.")
@click.option("--since", callback=age, metavar="AGE", help="Only what is younger than this: 30m, 1h, 7d.")
@output_option
@store_option
def events(name: str, follow: bool, since: float | None, output: str, store_url: str) -> None:
    """Print what the logs of a sweep, or of one run, say, oldest first. -o json: one JSON object a line."""
    from storage.url import open_store

    from ..grid.submission import find_run, load_submitted, sweep_names
    from ..reports.events import EventReader, as_json, line

    store = open_store(store_url)
    if name in sweep_names(store):
        reader = EventReader(store, [run.run_id for run in load_submitted(store, name).runs], name)
    else:
        reader = EventReader(store, [find_run(store, name, "sweep or run")[1]])
    shown, begin = as_json if output == "json" else line, time.time() - since if since else float("-inf")
    news, complained = reader.read(), set[str]()
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            for happening in news:
                if happening.moment >= begin:
                    click.echo(shown(happening))
            for log in reader.damaged.keys() - complained:
                complained.add(log)
                click.echo(f"{log}: its log is damaged: {reader.damaged[log]}", err=True)
            if not follow or reader.over:
                return
            sys.stdout.flush()
            time.sleep(1.0)
            news = reader.look()


@click.command()
@click.argument("run")
@output_option
@store_option
@sweeps_cluster_option
def explain(run: str, output: str, store_url: str, address: str | None) -> None:
    """Say why RUN waits, why it is on its node, and what its last end means for it."""
    from dataclasses import asdict

    from storage.log import run_log
    from storage.url import open_store

    from ..control.controller import policy_of
    from ..grid.submission import find_run
    from ..reports.explaining import explain as explained
    from ..reports.view import status
    from ..usual_store import store_flag
    from .session import controller_finder

    store = open_store(store_url)
    found, run_id = find_run(store, run)
    state = run_log(store, run_id).refresh()
    controller = None if state.finished else controller_finder(found.name, address)()
    outlook = controller.outlook(run_id) if controller else None
    told = explained(
        state,
        policy_of(found.recovery),
        outlook,
        time.time(),
        resume=f"orchestrate resume {found.name}{store_flag(store.url)}",
    )
    if output == "json":
        facts = {"schema": 1, "run": run_id, "status": status(state), "live": outlook is not None}
        thought = {"hold": outlook.hold, "for_s": outlook.for_s, "ahead": outlook.ahead} if outlook else {}
        click.echo(json.dumps(facts | thought | asdict(told)))
    else:
        click.echo(f"{run_id}: " + "\n".join(told.lines))


@click.command()
@click.argument("sweep", required=False)
@click.option("-a", "--all", "with_gone", is_flag=True, help="Also nodes that are gone.")
@output_option
@store_option
@sweeps_cluster_option
def nodes(sweep: str | None, with_gone: bool, output: str, store_url: str, address: str | None) -> None:
    """Show the nodes that train for SWEEP (by default: for each that a controller works on)."""
    from storage.url import open_store

    from ..reports import nodes as views
    from ..reports.node_table import table
    from ..reports.watch import console
    from .session import controllers

    store = open_store(store_url)
    rows = list(_rows(store, sweep, controllers(address)))
    if not rows:
        click.echo("no controller was reached: name a sweep to see what the store knows", err=True)
    for name, found, live in rows:
        shown = [view for view in found if with_gone or view.state != views.GONE]
        if output == "json":
            click.echo(json.dumps(views.as_json(name, shown, live=live)))
            continue
        if not live:
            click.echo(f"{name}: no controller was reached; this is what the store knows", err=True)
        if shown:
            console().print(table(name, shown))
        else:
            click.echo(f"{name}: no node trains for it", err=True)


@click.command()
@click.argument("node")
@click.argument("sweeps", nargs=-1)
@click.option(
    "--deadline",
    type=click.FloatRange(min=0),
    default=120.0,
    show_default=True,
    help="Seconds in which what trains there saves itself and ends.",
)
@click.option("--undo", is_flag=True, help="The node may be used again, also if it was in quarantine.")
@store_option
@sweeps_cluster_option
def drain(
    node: str, sweeps: tuple[str, ...], deadline: float, undo: bool, store_url: str, address: str | None
) -> None:
    """Leave NODE alone: its attempts save themselves and go on elsewhere, and nothing new is placed there.

    For SWEEPS, by default for each that a controller works on and that has the node. It holds until --undo,
    also for a node that comes back under its name.
    """
    from storage.probe import open_probed
    from storage.url import open_store

    from ..control.draining import ask_to_drain
    from ..errors import Unknown, shown, suggest
    from .session import controllers

    store = open_store(store_url)
    find = controllers(address)
    found = [entry for name in sweeps or (None,) for entry in _rows(store, name, find)]
    known = sorted({view.node for _, views, _ in found for view in views})
    chosen = [name for name, views, _ in found if sweeps or node in (view.node for view in views)]
    if not chosen or (node not in known and any(live for *_, live in found)):
        there = suggest(node, known) or f"there are: {', '.join(known[:8]) or 'none'}"
        raise Unknown(f"no node {shown(node)} trains for a sweep that a controller works on — {there}")
    store, probed = open_probed(store_url)
    for name in chosen:
        controller = find(name)
        ask_to_drain(store, name, node, None if undo else deadline, controller, atomic=probed.atomic)
        click.echo(f"{name}: {node} {_becomes(undo, deadline, reached=controller is not None)}")


def _becomes(undo: bool, deadline: float, *, reached: bool) -> str:
    what = "may be used again" if undo else f"is drained: attempts there get {deadline:g} s to end"
    return what if reached else f"{what} (no controller was reached: said to the next that looks)"


def _rows(
    store: "ObjectStore", sweep: str | None, find: "Callable[[str], RemoteController | None]"
) -> "Iterator[tuple[str, list[NodeView], bool]]":
    """Yield (sweep, its nodes, whether a controller said so), for one sweep or for all that are worked on."""
    from ..control.draining import drain_log
    from ..grid.submission import load_submitted, sweep_names
    from ..reports.nodes import nodes as nodes_of
    from ..reports.nodes import of_logs
    from ..reports.view import read_states

    for name in [sweep] if sweep else sweep_names(store):
        found = load_submitted(store, name) if sweep else None
        controller = find(name)
        if controller is None and found is None:
            continue
        drains = drain_log(store, name).refresh()
        if controller:
            yield name, nodes_of(controller.notes(), drains), True
        elif found:
            yield name, of_logs(read_states(found, store), drains), False


COMMANDS: tuple[click.Command, ...] = (events, explain, nodes, drain)
