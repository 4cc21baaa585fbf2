"""Data sets that lie on the hub or in a bucket, pinned like those that lie here: to their content.

Each is fetched once, where the sweep is submitted. From then on its runs are tied to those bytes, and to the
commit of the hub: what its owner changes later is noticed, and is never trained on by half a sweep.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from trainer.config import Dataset, RunSpec
from trainer.dataset.sources import Pin, Source, local_folder, pin
from trainer.errors import TrainerError
from trainer.rundir import Options, cache_folder

from ..errors import PreflightFailed, Problem


def remote_pins(specs: Iterable[RunSpec]) -> dict[Source, Pin]:
    """Return what the remote data sets of specs hold. What cannot be read is left out: preflight says why."""
    cache = cache_folder(Options())
    pins: dict[Source, Pin] = {}
    for dataset in dict.fromkeys(spec.dataset for spec in specs if spec.command is None):
        source = Source.of(dataset)
        if source.is_remote and source not in pins:
            with contextlib.suppress(TrainerError):
                pins[source] = pin(dataset, cache)
    return pins


@contextlib.contextmanager
def fetched(dataset: Dataset) -> Iterator[Path]:
    """Yield the folder of a remote data set, which stays within the block.

    Raises:
        PreflightFailed: It cannot be read (any more).
    """
    with contextlib.ExitStack() as held:
        try:
            folder = held.enter_context(local_folder(dataset, cache_folder(Options())))
        except TrainerError as error:
            raise PreflightFailed([Problem("E2204", str(error), "dataset.path", error.hint)]) from error
        yield folder


def is_remote(dataset: Dataset) -> bool:
    return Source.of(dataset).is_remote


def with_remote(spec: RunSpec, pins: Mapping[Source, Pin]) -> RunSpec:
    """Return the spec with its remote data set pinned. What the file itself pins stays."""
    found = pins.get(Source.of(spec.dataset))
    if found is None:
        return spec
    dataset = spec.dataset.model_copy(
        update={"digest": spec.dataset.digest or found.digest, "revision": found.revision}
    )
    return spec.model_copy(update={"dataset": dataset})
