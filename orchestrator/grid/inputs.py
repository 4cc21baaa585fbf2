"""The local datasets and base models of a sweep, as shared content of its store.

Uploaded once per store, whatever sweep needs them first; ``storage.content`` keeps who uses them. For a store
that is a folder nothing is uploaded by default: whoever sees the folder sees the paths, and a copy of a base
model is gigabytes.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from storage.content.store import LocalContent, store_for
from storage.errors import Corrupt
from storage.object_store import ObjectStore
from trainer.rundir import Options, cache_folder
from trainer.spec_inputs import Input, inputs_of

from ..amounts import size_text
from ..errors import PreflightFailed, Problem
from .schema import Storage
from .sweep import Sweep

Sent = Callable[[int], None]
"""Told the size of each file that is in the store from now on."""


def are_uploaded(storage: Storage, store: ObjectStore) -> bool:
    """Whether a sweep's local inputs go into its store."""
    if storage.upload_inputs == "auto":
        return not store.url.startswith("file:")
    return storage.upload_inputs == "always"


def local_inputs(sweep: Sweep) -> Iterator[tuple[str, LocalContent]]:
    """Yield the field and the files of each distinct local input of a sweep.

    Raises:
        PreflightFailed: One is not what it was when the sweep was made.
    """
    from .remote import fetched, is_remote  # imports Pillow, which few callers need

    memory = cache_folder(Options()) / "digests"
    seen = set[str]()
    for spec in (run.spec for run in sweep.runs):
        for named in inputs_of(spec):
            if named.digest is None or named.digest in seen:
                continue
            if named.what == "dataset" and is_remote(spec.dataset):
                seen.add(named.digest)
                with fetched(spec.dataset) as folder:
                    yield _unchanged(named, folder, memory)
            if not named.is_here:
                continue
            seen.add(named.digest)
            yield _unchanged(named, Path(named.path), memory)


def _unchanged(named: Input, path: Path, memory: Path) -> tuple[str, LocalContent]:
    local = named.content(path, memory)
    if local.digest != named.digest:
        raise _changed(f"{named.what} {named.path} has other content than the sweep was made for")
    return f"{named.what} {named.path}", local


def store_inputs(sweep: Sweep, store: ObjectStore, *, submitted: bool, on_sent: Sent) -> None:
    """Make sure that every local input is in the store, and stays there while the sweep exists.

    Raises:
        PreflightFailed: One changes meanwhile.
        StorageError
    """
    for _, local in local_inputs(sweep):
        try:
            store_for(store, sweep.name, local, submitted=submitted, on_sent=on_sent)
        except Corrupt as error:
            raise _changed(str(error)) from error


@contextlib.contextmanager
def shown_upload(sweep: Sweep, store: ObjectStore) -> Iterator[Sent]:
    """Show how far the upload is: a bar on a terminal, else one line. Nothing if all is there already."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("uploading inputs"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with contextlib.ExitStack() as stack:
        advance: list[Sent] = []

        def on_sent(size_bytes: int) -> None:
            if not advance:
                show(sum(local.listing.size_bytes for _, local in local_inputs(sweep)))
            advance[0](size_bytes)

        def show(total: int) -> None:
            if sys.stderr.isatty():
                bar = stack.enter_context(Progress(*columns, console=Console(stderr=True), transient=True))
                task = bar.add_task("", total=total)
                advance.append(lambda done: bar.advance(task, done))
            else:
                click.echo(f"uploading inputs, {size_text(total)}, to {store.url}", err=True)
                advance.append(lambda done: None)

        yield on_sent


def _changed(message: str) -> PreflightFailed:
    return PreflightFailed(
        [Problem(code="E2203", message=message, hint="leave it alone while it is submitted")]
    )
