"""Options that several commands have."""

import click

from ..usual_store import DEFAULT_STORE

store_option = click.option(
    "--store",
    "store_url",
    envvar="ORCHESTRATE_STORE",
    default=DEFAULT_STORE,
    show_default=True,
    help="Where sweeps are kept: s3://bucket/prefix?endpoint=… or file:///folder. [env: ORCHESTRATE_STORE]",
)
output_option = click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table")
