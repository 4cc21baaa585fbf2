"""The command ``orchestrate supervise``: its options, and which head they mean."""

import shlex
import sys
from typing import TYPE_CHECKING

import click

from .options import store_option

if TYPE_CHECKING:
    import threading

    from ..supervise.heads import Head

LOCAL = "local"
FILES = (".yaml", ".yml", ".json")
"""How the names of sweep files end; the name of a sweep never does."""
DEFAULT_ADDRESS = "127.0.0.1:6379"
EXIT_SIGNAL = 128


@click.command()
@click.argument("sweep", metavar="NAME|FILE")
@store_option
@click.option(
    "--address",
    envvar="RAY_ADDRESS",
    default=None,
    help="The Ray cluster, HOST:PORT; local: one on this machine, started when needed, which is also what is "
    "meant without --head. [env: RAY_ADDRESS]",
)
@click.option(
    "--head",
    "head_command",
    envvar="ORCHESTRATE_HEAD",
    default=None,
    metavar="COMMAND",
    help="Starts the Ray head at --address in the foreground, such as 'ray start --head --block'; it is "
    f"started again whenever it ends. Without --address: {DEFAULT_ADDRESS}. [env: ORCHESTRATE_HEAD]",
)
@click.option(
    "--detection",
    type=click.Choice(["fast", "patient"]),
    envvar="ORCHESTRATE_DETECTION",
    default="fast",
    show_default=True,
    help="How soon the heads started here take a silent node for dead; see docs/operations.md.",
)
@click.option(
    "--insecure", is_flag=True, help="Use a cluster elsewhere although RAY_AUTH_MODE=token is not set."
)
def supervise(
    sweep: str, store_url: str, address: str | None, head_command: str | None, detection: str, insecure: bool
) -> None:
    """Keep the Ray head and the controller of a sweep up until it is over; exit with its exit code.

    The sweep is one of the store, by its NAME, or a sweep FILE, which is submitted if it was not yet.
    """
    import contextlib
    import os
    import threading
    from pathlib import Path

    from storage.errors import Unavailable
    from storage.url import open_store

    from ..grid.submission import load_submitted
    from ..grid.sweep import load
    from ..on_ray.detection import ENVIRONMENT
    from ..supervise.loop import Supervisor, resuming, said, stopped_by_signals, sweeping

    if sweep.endswith(FILES):
        planned = load(Path(sweep))
        name, store, command = planned.name, open_store(planned.storage.url), sweeping(sweep)
    else:
        name, store = sweep, open_store(store_url)
        command = resuming(name, store.url)
        with contextlib.suppress(Unavailable):  # it may be back sooner than a head would be
            load_submitted(store, name)
    if insecure:
        command = [*command, "--insecure"]
    os.environ[ENVIRONMENT] = detection
    stop = threading.Event()
    with stopped_by_signals(stop) as came:
        head = _head(address, head_command, detection, stop)
        try:
            code = Supervisor(name, store, head, say=said, stop=stop, command=command).run()
        except BaseException:
            head.close()
            raise
        if code is None:
            said("asked to stop" + ("; what was started here ends" if head.owned else ""))
            head.close()
            code = EXIT_SIGNAL + (came[0] if came else 0)
        else:
            head.leave()
    sys.exit(code)


def _head(address: str | None, command: str | None, detection: str, stop: "threading.Event") -> "Head":
    from ..errors import InvalidFile, Problem
    from ..supervise.heads import CommandHead, LocalHead, RemoteHead

    if command is None:
        return LocalHead() if address in (None, LOCAL) else RemoteHead(str(address))
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InvalidFile([Problem("E2611", f"--head cannot be read as a command: {error}")]) from error
    if not words or address in (LOCAL, "auto"):
        hint = "give the address HOST:PORT at which the head that it starts will answer"
        raise InvalidFile([Problem("E2611", f"--head with --address {address}", hint=hint)])
    return CommandHead(words, address or DEFAULT_ADDRESS, detection, stop)
