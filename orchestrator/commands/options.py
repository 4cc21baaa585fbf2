"""Options that several commands have."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from ..usual_store import DEFAULT_STORE

Command = TypeVar("Command", bound=Callable[..., Any])

store_option = click.option(
    "--store",
    "store_url",
    envvar="ORCHESTRATE_STORE",
    default=DEFAULT_STORE,
    show_default=True,
    help="Where sweeps are kept: s3://bucket/prefix?endpoint=… or file:///folder. [env: ORCHESTRATE_STORE]",
)
output_option = click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table")


def address_option(text: str) -> Callable[[Command], Command]:
    """The option that names a Ray cluster; ``text`` says what of it, and which is meant by default."""
    return click.option("--address", envvar="RAY_ADDRESS", default=None, help=text)
