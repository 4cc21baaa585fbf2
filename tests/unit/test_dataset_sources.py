"""Data sets on the hub become folders: exported as they are, fetched once, pinned to commit and content."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image
from support.dataset_hub import COMMIT, served

from trainer.config import Dataset
from trainer.dataset.folder import scan
from trainer.dataset.hub import export
from trainer.dataset.sources import Source
from trainer.errors import BadInput


def write_folder(folder: Path) -> Path:
    """Three images in three formats, two of them with captions, as ``datasets`` reads folders."""
    folder.mkdir(parents=True)
    rows = []
    for index, name in enumerate(("a.png", "b.jpg", "c.webp")):
        Image.new("RGB", (8 + index, 8), (index * 90, 0, 0)).save(folder / name)
        rows.append({"file_name": name, "text": f"number {index}", "label": index})
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def source(**changes: Any) -> Source:
    return Source.of(Dataset.model_validate({"path": "hub://owner/name", **changes}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "folder")


@pytest.fixture(scope="module")
def rows(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> datasets.Dataset:
    """The same, as a table that was saved and loaded again, with the images' bytes in it."""
    cache = tmp_path_factory.mktemp("cache")
    built = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(cache))
    saved = tmp_path_factory.mktemp("saved")
    built.save_to_disk(saved)
    return datasets.load_from_disk(str(saved))


def exported(rows: Any, target: Path, within: str = "hf://", **changes: Any) -> list[tuple[str, str]]:
    target.mkdir()
    export(rows, source(**changes), target, within=within)
    return [(e.name, e.caption) for e in scan(Dataset(path="x", caption="none", val_fraction=0), target)]


NUMBERED = [("000000.png", "number 0"), ("000001.jpg", "number 1"), ("000002.webp", "number 2")]


def test_a_table_is_exported_row_by_row_with_the_very_bytes(
    rows: datasets.Dataset, folder: Path, tmp_path: Path
) -> None:
    alive: list[None] = []
    assert exported(rows.to_iterable_dataset(), tmp_path / "out") == NUMBERED
    export(rows.to_iterable_dataset(), source(), tmp_path / "out", lambda: alive.append(None))

    assert len(alive) == 3
    for name, original in (("000000.png", "a.png"), ("000001.jpg", "b.jpg")):
        assert (tmp_path / "out" / name).read_bytes() == (folder / original).read_bytes()


def test_a_folder_of_files_is_streamed(folder: Path, tmp_path: Path) -> None:
    rows = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", streaming=True)

    assert exported(rows, tmp_path / "out", within=str(folder)) == NUMBERED
    with pytest.raises(BadInput, match="row 0 names an image outside of the data set"):
        exported(rows, tmp_path / "none")


def test_other_columns(rows: datasets.Dataset, tmp_path: Path) -> None:
    renamed = rows.rename_columns({"image": "photo", "text": "words"}).to_iterable_dataset()
    assert exported(renamed, tmp_path / "a", image_column="photo", caption_column="words") == NUMBERED
    none = [(name, "none") for name, _ in NUMBERED]
    assert exported(rows.remove_columns("text").to_iterable_dataset(), tmp_path / "b") == none


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"image_column": "photo"},
            "column 'photo' holds no images; its columns: image (Image), text (Value)",
        ),
        ({"image_column": "label"}, "column 'label' holds no images"),
        ({"caption_column": "label"}, "column 'label' holds no texts"),
    ],
)
def test_columns_that_do_not_fit_are_named(
    changes: dict[str, str], said: str, rows: datasets.Dataset, tmp_path: Path
) -> None:
    with pytest.raises(BadInput) as caught:
        exported(rows.to_iterable_dataset(), tmp_path / "out", **changes)
    assert said in str(caught.value)


def test_a_row_without_a_usable_image_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.gif")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    for body in (None, {"bytes": (tmp_path / "a.gif").read_bytes(), "path": None}):
        rows = datasets.Dataset.from_dict({"image": [body], "text": ["x"]}, features=features)
        with pytest.raises(BadInput, match="row 0 holds no PNG, JPEG or WebP image"):
            exported(rows.to_iterable_dataset(), tmp_path / f"out{body is None}")


READER = """
import sys
from pathlib import Path
from huggingface_hub import constants
from trainer.config import Dataset
from trainer.dataset.sources import local_folder, pin
from trainer.errors import TrainerError

cache = Path(sys.argv[1])

def show(read, **keys):
    try:
        print(read(Dataset.model_validate({"path": "hub://owner/name", **keys})))
    except TrainerError as error:
        print(type(error).__name__, error)

def names(dataset):
    with local_folder(dataset, cache) as folder:
        return sorted(path.name for path in folder.iterdir())

show(lambda dataset: pin(dataset, cache))
show(names, revision="gone")
show(names, split="dev")
show(names, path="hub://owner/other")
constants.ENDPOINT = "http://127.0.0.1:9"
show(names, revision="c" * 40)
show(names)
"""


def test_a_data_set_on_the_hub_is_fetched_once_for_its_commit(folder: Path, tmp_path: Path) -> None:
    with served(folder, tmp_path / "home") as environment:
        done = subprocess.run(
            [sys.executable, "-c", READER, str(tmp_path / "cache")],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    pinned, gone, split, other, alone, unreachable = done.stdout.splitlines()

    assert pinned.startswith("Pin(digest='")
    assert pinned.endswith(f"revision='{COMMIT}')")
    assert gone == "BadInput dataset hub://owner/name at revision gone: the hub has no such revision"
    assert split.startswith("BadInput dataset hub://owner/name cannot be read: Bad split: dev.")
    assert other.startswith("BadInput dataset hub://owner/other: there is no such data set on the hub")
    names = ["000000.png", "000001.jpg", "000002.webp", "metadata.jsonl"]
    assert alone == str(names), "a pinned commit that is here needs no hub"
    assert unreachable.startswith("BaseUnavailable dataset hub://owner/name: the hub did not answer")
