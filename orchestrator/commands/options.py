"""Options that several commands have."""

import os
import shlex

import click

DEFAULT_STORE = "file://./orchestrate-store"

store_option = click.option(
    "--store",
    "store_url",
    envvar="ORCHESTRATE_STORE",
    default=DEFAULT_STORE,
    show_default=True,
    help="Where sweeps are kept: s3://bucket/prefix?endpoint=… or file:///folder. [env: ORCHESTRATE_STORE]",
)
output_option = click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table")


def store_flag(url: str) -> str:
    """Return what a command line needs to mean this store; nothing if it is the one that is meant anyway."""
    from storage.errors import InvalidName
    from storage.url import open_store

    try:
        usual = open_store(os.environ.get("ORCHESTRATE_STORE") or DEFAULT_STORE).url
    except InvalidName:
        usual = None
    return "" if url == usual else f" --store {shlex.quote(url)}"
