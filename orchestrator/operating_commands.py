"""The commands of who keeps a sweep going: ``events``, and those about nodes. Parse, call, print."""

import contextlib
import sys
import time

import click

from .options import output_option, store_option
from .storage_commands import age


@click.command()
@click.argument("name")
@click.option("-f", "--follow", is_flag=True, help="Go on until every run is over, or Ctrl-C.")
@click.option("--since", callback=age, metavar="AGE", help="Only what is younger than this: 30m, 1h, 7d.")
@output_option
@store_option
def events(name: str, follow: bool, since: float | None, output: str, store_url: str) -> None:
    """Print what the logs of a sweep, or of one run, say, oldest first. -o json: one JSON object a line."""
    from storage.url import open_store

    from .events import EventReader, as_json, line
    from .submission import find_run, load_submitted, sweep_names

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


COMMANDS: tuple[click.Command, ...] = (events,)
