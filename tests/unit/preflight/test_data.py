"""Data that a sweep names is there and fit to train on, before anything is launched."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from support.preflight import GRID, Check, lose_captions

from orchestrator.grid.sweep import load
from orchestrator.launching.data import surveys
from orchestrator.launching.preflight import check
from storage.memory import MemoryStore


def write_metadata(data: Path, *rows: object) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (data / "metadata.jsonl").write_text("\n".join(lines))


def damage(data: Path) -> None:
    whole = (data / "2.png").read_bytes()
    (data / "2.png").write_bytes(whole[: len(whole) // 2])


def inflate(data: Path) -> None:
    Image.new("1", (10_000, 10_000)).save(data / "2.png")


def empty(data: Path) -> None:
    for path in data.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "code", "message"),
    [
        pytest.param(lambda data: data.rename(data.parent / "gone"), "E2201", "data does not exist", id="41"),
        pytest.param(
            lambda data: (empty(data), data.rmdir(), data.touch()), "E2201", "is not a folder", id="41-file"
        ),
        pytest.param(empty, "E2202", "no PNG, JPEG or WebP image in it", id="42"),
        pytest.param(damage, "E2202", "2.png: not a PNG, JPEG or WebP image, or damaged", id="43"),
        pytest.param(
            lambda data: (data / "2.png").write_text("<html>"), "E2202", "2.png: not a PNG", id="43-html"
        ),
        pytest.param(inflate, "E2202", "2.png: more than 64 megapixels; scale it down", id="44"),
        pytest.param(lose_captions, "E2202", "2 of 4 images have no caption: 1.png, 3.png", id="45"),
        pytest.param(
            lambda data: write_metadata(data, {"file_name": "0.png", "text": "x"}, "{"),
            "E2202",
            "metadata.jsonl line 2: not JSON",
            id="46-line",
        ),
        pytest.param(
            lambda data: write_metadata(data, {"file_name": "../0.png", "text": "x"}),
            "E2202",
            "metadata.jsonl line 1: file_name '../0.png' leaves the dataset folder",
            id="46-escape",
        ),
        pytest.param(
            lambda data: write_metadata(data, {"file_name": "9.png", "text": "x"}),
            "E2202",
            "metadata.jsonl line 1: 9.png is not an image in the folder",
            id="46-missing",
        ),
        pytest.param(
            lambda data: Image.new("RGB", (8, 8)).save(data / "2.jpg"),
            "E2202",
            "share one caption file, 2.txt: rename one",
            id="47",
        ),
    ],
)
def test_a_bad_dataset_is_named(
    spoil: Callable[[Path], object], code: str, message: str, data: Path, problems_of: Check
) -> None:
    spoil(data)
    [problem] = problems_of()
    assert code in problem
    assert message in problem
    assert str(data) in problem


def test_48_a_dataset_of_which_nothing_is_left_to_train_on(data: Path, problems_of: Check) -> None:
    [problem] = problems_of(GRID.replace("path: data", "path: data, val_fraction: 0.9"))
    assert "E2202" in problem
    assert "val_fraction 0.9 of 4 images leaves none to train on" in problem


def test_49_a_dataset_that_changed_since_its_digest_was_stated(problems_of: Check) -> None:
    [problem] = problems_of(GRID.replace("path: data", f"path: data, digest: {'a' * 64}"))
    assert problem.startswith("dataset.digest E2203 ")
    assert "has other content than the sweep was made for" in problem


def test_49_a_dataset_that_changes_while_it_is_submitted(data: Path) -> None:
    file = data.parent / "grid.yaml"
    file.write_text(GRID)
    sweep = load(file)
    (data / "0.txt").write_text("another caption")
    assert [problem.code for problem in check(sweep, MemoryStore("kept"))] == ["E2203"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("ftp://data", "E2201 dataset ftp://…: nothing is read from there — dataset.path is a local folder"),
        ("hub://a/b/c", "E2201 dataset hub://…: not of the form hub://owner/name"),
        ("s3://bucket/data?region=Mars", "E2201 dataset: url: 'Mars' is not a region"),
    ],
)
def test_a_remote_dataset_that_cannot_be_read_is_named(path: str, expected: str, problems_of: Check) -> None:
    [problem] = problems_of(GRID.replace("path: data", f"path: '{path}'"))
    assert problem.startswith(f"dataset.path {expected}")


def test_a_hub_dataset_needs_a_package_of_its_own(
    problems_of: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    [problem] = problems_of(GRID.replace("path: data", "path: hub://owner/name"))
    assert problem.startswith("dataset.path E2205 data sets on the hub need the package datasets")
    assert "pip install 'orchestrate-loras[hub]'" in problem


def test_class_images_are_looked_at(data: Path, problems_of: Check) -> None:
    folder = data.parent / "dogs"
    text = GRID + "prior: {prompt: a dog, path: dogs}\n"

    [missing] = problems_of(text)
    folder.mkdir()
    [empty] = problems_of(text)
    shutil.copy(data / "0.png", folder / "0.png")
    good = problems_of(text)
    (folder / "1.png").write_bytes(b"no image")
    [damaged] = problems_of(text)

    assert good == []
    for problem, said in ((missing, "does not exist"), (empty, "holds no PNG"), (damaged, "not a PNG")):
        assert problem.startswith("prior.path E2208")
        assert said in problem


def test_fewer_images_than_a_batch_are_refused_with_what_would_work(problems_of: Check, data: Path) -> None:
    text = GRID.replace("resolution", "train_batch_size: 4, resolution")
    assert problems_of(text) == [
        "base.train_batch_size E2206 a batch has 4 images, but an epoch has 3 to train on — lower "
        "train_batch_size (and raise gradient_accumulation_steps), add images, or let them repeat"
    ]
    assert problems_of(text.replace("data}", "data, concepts: {.: {repeats: 2}}}")) == []


def test_what_the_data_sets_hold_is_told_before_anything_starts(data: Path) -> None:
    Image.new("RGB", (40, 24)).save(data / "0.png")
    (data / "1.txt").unlink()
    file = data.parent / "grid.yaml"
    file.write_text(
        GRID.replace("data}", "data, buckets: true, bucket_min: 16, bucket_step: 8, val_fraction: 0}")
    )

    assert surveys(run.spec for run in load(file).runs) == [
        f"dataset {data}: 4 images, 1 caption, 1 missing; 0 held out, 3 samples an epoch; "
        "2 enlarged more than 2 times",
        "  32×32: 2 images",
        "  40×24: 1 image",
    ]
