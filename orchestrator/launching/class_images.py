"""Looks at the folders of class images that the priors of a sweep name."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from trainer.config import RunSpec
from trainer.dataset.folder import files_in
from trainer.dataset.images import is_image, read_image
from trainer.errors import BadInput

from ..errors import Problem

_DRAWN = "leave it out: class images are then drawn from the base"


def class_image_problems(specs: Iterable[RunSpec]) -> Iterator[Problem]:
    """Yield what is wrong with folders of class images. Decodes every image once."""
    for path in dict.fromkeys(spec.prior.path for spec in specs if spec.prior and spec.prior.path):
        for text in _wrong(Path(path)):
            yield Problem("E2208", text, "prior.path", _DRAWN)


def _wrong(folder: Path) -> Iterator[str]:
    if not folder.is_dir():
        yield f"folder of class images {folder} {'is not a folder' if folder.exists() else 'does not exist'}"
        return
    images = [path for name, path in files_in(folder) if is_image(name)]
    if not images:
        yield f"folder of class images {folder} holds no PNG, JPEG or WebP image"
    for path in images:
        try:
            read_image(path)
        except BadInput as error:
            yield str(error)
