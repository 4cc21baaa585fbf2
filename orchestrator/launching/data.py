"""Looks at the data sets of a sweep: can they be trained on, and what does a person want to know of them?"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from storage.redaction import redacted
from trainer.config import Base, Dataset, RunSpec
from trainer.dataset.folder import contents_of, dataset_digest
from trainer.dataset.sources import Source, local_folder
from trainer.dataset.survey import lines, most_samples, problems, survey
from trainer.errors import BaseUnavailable, NodeUnfit, TrainerError
from trainer.run_dataset import ENOUGH, too_few
from trainer.rundir import Options, cache_folder

from ..errors import Problem

_DEFAULTS = Dataset(path="")
_OF_CAPTIONS = (
    *("caption_dropout", "shuffle_caption", "caption_separator", "keep_tokens", "tag_dropout"),
    *("cache_text", "random_flip", "center_crop"),
)
_OF_SIZES = ("buckets", "bucket_min", "bucket_max", "bucket_step")
"""Keys that change how a data set is used, and not what is in it."""


def dataset_problems(specs: Iterable[RunSpec]) -> Iterator[Problem]:
    """Yield what is wrong with the data sets of specs. Fetches remote ones, and decodes every image once."""
    specs, samples = list(specs), dict[Dataset, int]()
    for dataset in dict.fromkeys(_alike(spec.dataset, *_OF_CAPTIONS, *_OF_SIZES) for spec in specs):
        found, samples[dataset] = _looked_at(dataset)
        yield from found
    for dataset, base in dict.fromkeys(
        (_alike(spec.dataset, *_OF_CAPTIONS, *_OF_SIZES), spec.base) for spec in specs
    ):
        yield from _batch(base, samples[dataset])


def surveys(specs: Iterable[RunSpec]) -> list[str]:
    """Return what the data sets of specs hold, for a person to read; nothing of those that cannot be read."""
    blocks: list[tuple[str, ...]] = []
    for dataset, resolution in dict.fromkeys(
        (_alike(spec.dataset, *_OF_CAPTIONS), spec.base.resolution) for spec in specs
    ):
        try:
            with local_folder(dataset, cache_folder(Options())) as folder:
                found = survey(dataset, resolution, folder)
        except TrainerError:
            continue
        if found.images:
            blocks.append(tuple(lines(dataset.path, found)))
    return [line for block in dict.fromkeys(blocks) for line in block]


def _looked_at(dataset: Dataset) -> tuple[list[Problem], int]:
    """What is wrong with a data set, and how many samples an epoch of it has at most."""
    where = "dataset.path"
    if not Source.of(dataset).is_remote and not Path(dataset.path).is_dir():
        folder = Path(dataset.path)
        message = f"dataset folder {folder} {'is not a folder' if folder.exists() else 'does not exist'}"
        hint = "relative paths start at the folder of the sweep file"
        return [Problem("E2201", message, where, hint)], 0
    try:
        with local_folder(dataset, cache_folder(Options())) as folder:
            return list(_folder_problems(dataset, folder)), most_samples(
                dataset, contents_of(dataset, folder).examples
            )
    except BaseUnavailable as error:
        return [Problem("E2204", redacted(str(error)), where, error.hint)], 0
    except NodeUnfit as error:
        return [Problem("E2205", redacted(str(error)), where, error.hint)], 0
    except TrainerError as error:
        return [Problem("E2201", redacted(str(error)), where, error.hint)], 0


def _folder_problems(dataset: Dataset, folder: Path) -> Iterator[Problem]:
    wrong = problems(dataset, folder)
    for text in wrong:
        yield Problem("E2202", f"dataset {dataset.path}: {text}", "dataset")
    if not wrong and (dataset.digest is None or dataset_digest(folder) != dataset.digest):
        message = f"dataset {dataset.path} has other content than the sweep was made for"
        yield Problem("E2203", message, "dataset.digest", "leave the folder alone while it is submitted")


def _batch(base: Base, samples: int) -> Iterator[Problem]:
    if 0 < samples < base.train_batch_size:
        yield Problem("E2206", too_few(samples, base.train_batch_size), "base.train_batch_size", ENOUGH)
    elif 0 < samples < base.samples_per_step:
        message = f"a step sees {base.samples_per_step} images, but an epoch has {samples} to train on"
        yield Problem("W2314", message, "base.train_batch_size", "the same images repeat within a step")


def _alike(dataset: Dataset, *keys: str) -> Dataset:
    """The data set with some keys at their defaults, so that those that differ in them only are equal."""
    return dataset.model_copy(update={key: getattr(_DEFAULTS, key) for key in keys})
