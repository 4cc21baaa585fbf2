"""The data set of one run, on this node: where its files are, and that they are the submitted ones."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from .config import RunSpec
from .dataset.folder import Example, dataset_digest, scan
from .dataset.sources import local_folder
from .dataset.survey import lines, survey
from .errors import BadInput
from .narration import say
from .rundir import Options, cache_folder


@contextlib.contextmanager
def examples_of(spec: RunSpec, options: Options, alive: Callable[[], None]) -> Iterator[list[Example]]:
    """Yield the examples of the run's data set, whose files stay where they are within the block.

    Args:
        alive: Called every now and then while files are fetched.

    Raises:
        BadInput: The data set is not there, is wrong, or is not the one that was submitted.
        BaseUnavailable: It cannot be reached now.
    """
    dataset, cache = spec.dataset, cache_folder(options)
    with contextlib.ExitStack() as held:
        if copy := options.content.get(dataset.digest or ""):
            folder = Path(copy)  # verified when it was fetched
            examples = scan(dataset, folder)
        else:
            folder = held.enter_context(local_folder(dataset, cache, alive))
            examples = scan(dataset, folder)
            _check(spec, folder, cache / "digests")
        for line in lines(dataset.path, survey(dataset, spec.base.resolution, folder)):
            say(line)
        yield examples


def check_enough(spec: RunSpec, samples: int) -> None:
    """Make sure that the images to train on fill a forward pass.

    Args:
        samples: Of an epoch.

    Raises:
        BadInput: They do not: some would come twice in every one.
    """
    if samples < spec.base.train_batch_size:
        raise BadInput(too_few(samples, spec.base.train_batch_size), ENOUGH)


ENOUGH = "lower train_batch_size (and raise gradient_accumulation_steps), add images, or let them repeat"


def too_few(samples: int, batch: int) -> str:
    """Say that a batch has more images than an epoch."""
    return f"a batch has {batch} images, but an epoch has {samples} to train on"


def _check(spec: RunSpec, folder: Path, memory: Path) -> None:
    digest = spec.dataset.digest
    if digest and (actual := dataset_digest(folder, memory)) != digest:
        where = spec.dataset.path if "://" in spec.dataset.path else folder
        raise BadInput(
            f"dataset {where} has digest {actual[:12]}, the run was submitted with "
            f"{digest[:12]}: its files differ from those at submission",
            "restore them, or submit a new sweep",
        )
