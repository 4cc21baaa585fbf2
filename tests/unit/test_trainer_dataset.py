"""Folders of images: what is read, what is refused and how that is said."""

import json
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from trainer.config import Dataset, RunSpec
from trainer.dataset.folder import dataset_digest, scan
from trainer.dataset.images import read_image
from trainer.dataset.survey import lines, problems, survey
from trainer.errors import BadInput


def image(path: Path, color: str = "red", mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (16, 8), color).save(path)


def metadata(folder: Path, *rows: Any) -> None:
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def good(folder: Path) -> None:
    for name in ("a", "b"):
        image(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"caption of {name}\n")


def nothing(folder: Path) -> None:
    folder.rmdir()


def a_file(folder: Path) -> None:
    folder.rmdir()
    folder.write_text("")


def no_image(folder: Path) -> None:
    (folder / "notes.md").write_text("hello")


def truncated(folder: Path) -> None:
    good(folder)
    whole = folder / "b.png"
    whole.write_bytes(whole.read_bytes()[:-30])


def not_an_image(folder: Path) -> None:
    good(folder)
    (folder / "b.png").write_text("%!PS-Adobe")


def bomb(folder: Path) -> None:
    """A PNG of a few bytes that claims 100 by 100 thousand pixels."""
    good(folder)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))
    (folder / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def large(folder: Path) -> None:
    """Below what Pillow refuses by itself, above our limit."""
    good(folder)
    Image.new("1", (8_001, 8_000)).save(folder / "b.png")


def uncaptioned(folder: Path) -> None:
    good(folder)
    (folder / "a.txt").unlink()


def bad_json(folder: Path) -> None:
    image(folder / "a.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n{"file_name": \n')


def no_text(folder: Path) -> None:
    image(folder / "a.png")
    metadata(folder, {"file_name": "a.png", "label": 3})


def escapes(folder: Path) -> None:
    image(folder / "a.png")
    image(folder.parent / "secret.png")
    metadata(folder, {"file_name": "../secret.png", "text": "x"})


def absent(folder: Path) -> None:
    image(folder / "a.png")
    metadata(folder, {"file_name": "a.png", "text": "x"}, {"file_name": "b.png", "text": "x"})


def listed_twice(folder: Path) -> None:
    image(folder / "a.png")
    metadata(folder, {"file_name": "a.png", "text": "x"}, {"file_name": "a.png", "text": "y"})


def shared_stem(folder: Path) -> None:
    good(folder)
    image(folder / "a.jpg")


def one_image(folder: Path) -> None:
    image(folder / "a.png")
    (folder / "a.txt").write_text("x")


def no_trigger(folder: Path) -> None:
    good(folder)
    (folder / "a.txt").write_text("a photo of [trigger]")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (nothing, "no such folder"),
        (a_file, "not a folder"),
        (no_image, "no PNG, JPEG or WebP image in it"),
        (truncated, "{folder}/b.png: damaged image: image file is truncated"),
        (not_an_image, "{folder}/b.png: not a PNG, JPEG or WebP image, or damaged"),
        (bomb, "{folder}/b.png: more than 64 megapixels; scale it down"),
        (large, "{folder}/b.png: more than 64 megapixels; scale it down"),
        (uncaptioned, "1 of 2 images have no caption: a.png"),
        (bad_json, "metadata.jsonl line 2: not JSON: Expecting value: line 1 column 15 (char 14)"),
        (no_text, "metadata.jsonl line 1: a.png has no text, prompt or caption"),
        (escapes, "metadata.jsonl line 1: file_name '../secret.png' leaves the dataset folder"),
        (absent, "metadata.jsonl line 2: b.png is not an image in the folder"),
        (listed_twice, "metadata.jsonl line 2: a.png is listed twice"),
        (shared_stem, "a.jpg and a.png share one caption file, a.txt: rename one"),
        (
            one_image,
            "val_fraction 0.5 of 1 images leaves none to train on; lower it or add images",
        ),
        (no_trigger, "captions contain [trigger], but dataset.trigger is not set"),
    ],
)
def test_problems(make: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    make(folder)

    found = problems(Dataset(path=str(folder), val_fraction=0.5))

    assert [problem for problem in found if said.format(folder=folder) in problem], found


def test_all_problems_are_said_at_once(tmp_path: Path) -> None:
    shared_stem(tmp_path)
    (tmp_path / "b.txt").unlink()

    with pytest.raises(BadInput) as caught:
        scan(Dataset(path=str(tmp_path), val_fraction=0.9), tmp_path)

    assert str(caught.value).count(";") >= 2
    assert caught.value.exit_code == 78


def test_captions_come_from_text_files_metadata_and_the_spec(tmp_path: Path) -> None:
    good(tmp_path)
    image(tmp_path / "deep" / "c.webp")
    image(tmp_path / "d.jpeg")
    (tmp_path / ".hidden.png").write_text("")
    metadata(
        tmp_path, {"file_name": "deep/c.webp", "prompt": "a [trigger]"}, {"file_name": "a.png", "text": "A"}
    )
    dataset = Dataset(path=str(tmp_path), caption="any [trigger]", trigger="rufus")

    found = [(example.name, example.caption) for example in scan(dataset, tmp_path)]

    assert found == [
        ("a.png", "A"),
        ("b.png", "caption of b"),
        ("d.jpeg", "any rufus"),
        ("deep/c.webp", "a rufus"),
    ]
    assert problems(dataset) == []


def test_the_digest_follows_names_and_contents_and_nothing_else(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        good(folder)
    (two / ".DS_Store").write_text("x")
    (two / "README.md").write_text("x")
    before = dataset_digest(one)
    assert dataset_digest(two) == before

    (two / "a.txt").write_text("another caption")
    assert dataset_digest(two) != before
    (one / "b.png").rename(one / "c.png")
    assert dataset_digest(one) != before


def test_transparent_images_are_put_on_white_and_turned_upright(tmp_path: Path) -> None:
    image(tmp_path / "clear.png", "#ff000000", "RGBA")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    Image.new("RGB", (16, 8)).save(tmp_path / "turned.jpg", exif=exif)

    assert read_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    assert read_image(tmp_path / "turned.jpg").size == (8, 16)


def test_scanning_needs_no_torch() -> None:
    import subprocess
    import sys

    program = "import sys, trainer.dataset.sources, trainer.dataset.survey; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert shown.stdout.strip() == "False"


def test_kohyas_folders_repeat_their_images_and_name_them(tmp_path: Path) -> None:
    image(tmp_path / "10_sks dog" / "a.png")
    image(tmp_path / "10_sks dog" / "b.png")
    (tmp_path / "10_sks dog" / "b.txt").write_text("sks dog on grass")
    image(tmp_path / "2_cat" / "deep" / "c.png")
    image(tmp_path / "2024_paris" / "d.png")
    concepts = {
        "2_cat": {"loss_weight": 0.5},
        "2_cat/deep": {"trigger": "whiskers", "caption": "[trigger]"},
        ".": {"caption": "any", "repeats": 3},
    }
    dataset = Dataset.model_validate({"path": "x", "concepts": concepts, "val_fraction": 0})

    found = [(e.name, e.caption, e.concept, e.repeats, e.loss_weight) for e in scan(dataset, tmp_path)]

    assert found == [
        ("10_sks dog/a.png", "sks dog", "10_sks dog", 10, 1.0),
        ("10_sks dog/b.png", "sks dog on grass", "10_sks dog", 10, 1.0),
        ("2024_paris/d.png", "any", ".", 3, 1.0),
        ("2_cat/deep/c.png", "whiskers", "2_cat/deep", 2, 0.5),
    ]
    assert lines("photos", survey(dataset, 8, tmp_path)) == [
        "dataset photos: 4 images, 4 captions, 0 missing; 0 held out, 25 samples an epoch",
        "  concept 10_sks dog: 2 images × 10",
        "  concept .: 1 image × 3",
        "  concept 2_cat/deep: 1 image × 2, loss × 0.5",
    ]


def test_a_concept_without_images_is_a_mistake(tmp_path: Path) -> None:
    good(tmp_path)
    dataset = Dataset.model_validate({"path": str(tmp_path), "concepts": {"dgo": {"repeats": 2}}})

    assert problems(dataset) == [
        "dataset.concepts names 'dgo', but no image lies there; subfolders with images: none"
    ]


def test_a_table_of_captions_is_read_and_two_are_not(tmp_path: Path) -> None:
    good(tmp_path)
    (tmp_path / "metadata.csv").write_text('\ufefffile_name,text\r\na.png,"one, two"\r\n')
    dataset = Dataset(path=str(tmp_path), val_fraction=0)
    assert [example.caption for example in scan(dataset, tmp_path)] == ["one, two", "caption of b"]

    metadata(tmp_path, {"file_name": "a.png", "text": "x"})
    assert problems(dataset) == ["there are both metadata.jsonl and metadata.csv: keep one"]


def mask(path: Path, color: int = 255, size: tuple[int, int] = (16, 8)) -> None:
    Image.new("L", size, color).save(path)


@pytest.mark.parametrize(
    ("masks", "make", "said"),
    [
        (
            "files",
            lambda f: mask(f / "c.mask.png"),
            "c.mask.png is a mask, but the image that it would belong",
        ),
        ("files", lambda f: mask(f / "a.mask.png", size=(8, 8)), "the mask has 8×8 pixels, its image 16×8"),
        (
            "files",
            lambda f: mask(f / "a.mask.png", 0),
            "a.mask.png: black everywhere, so nothing of the image",
        ),
        (
            "files",
            lambda f: (f / "a.mask.png").write_bytes(b"x"),
            "a.mask.png: not a PNG, JPEG or WebP image",
        ),
        (
            "files",
            lambda f: (mask(f / "a.mask.png"), mask(f / "a.mask.jpg")),
            "a.png has two masks, a.mask.jpg and a.mask.png: keep one",
        ),
        (
            "files",
            lambda f: None,
            "dataset.masks is files, but there is no mask: put x.mask.png beside x.png",
        ),
        ("alpha", lambda f: image(f / "a.png", "#00000000", "RGBA"), "a.png: transparent everywhere"),
    ],
)
def test_bad_masks(masks: str, make: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    good(tmp_path)
    make(tmp_path)

    [problem] = problems(Dataset.model_validate({"path": str(tmp_path), "masks": masks}))

    assert said in problem


def test_a_mask_is_no_image_also_where_it_is_not_used(tmp_path: Path) -> None:
    good(tmp_path)
    mask(tmp_path / "a.mask.png")
    for masks, count in (("none", None), ("files", 1)):
        dataset = Dataset.model_validate({"path": str(tmp_path), "masks": masks, "val_fraction": 0})
        assert [example.name for example in scan(dataset, tmp_path)] == ["a.png", "b.png"]
        assert problems(dataset) == []
        assert survey(dataset, 8, tmp_path).masked == count


@pytest.mark.parametrize(
    ("base", "dataset", "said"),
    [
        ({}, {"cache_text": True, "shuffle_caption": True}, "but dataset.shuffle_caption makes another one"),
        ({}, {"cache_text": True, "tag_dropout": 0.1}, "but dataset.tag_dropout makes another one"),
        ({"train_text_encoder": True}, {"cache_text": True}, "leave cache_text at auto, or set train_text"),
        ({"resolution": 128}, {"buckets": True}, "set dataset.bucket_min to 64 or less"),
        ({}, {"buckets": True, "bucket_min": 512, "bucket_max": 256}, "is above dataset.bucket_max (256)"),
    ],
)
def test_settings_that_contradict_each_other(
    base: dict[str, Any], dataset: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        RunSpec.model_validate({"base": {"model": "m", **base}, "dataset": {"path": "x", **dataset}})


def test_what_such_a_message_names_works() -> None:
    for resolution in (8, 64, 100, 128, 256, 1000):
        for least, step in ((256, 64), (1024, 64), (128, 256)):
            given = {"buckets": True, "bucket_min": least, "bucket_max": 1024, "bucket_step": step}
            spec = {
                "base": {"model": "m", "resolution": resolution // 8 * 8},
                "dataset": {"path": "x", **given},
            }
            try:
                RunSpec.model_validate(spec)
            except ValueError as error:
                told = dict(re.findall(r"(bucket_\w+) to (\d+)", str(error)))
                spec["dataset"].update({key: int(value) for key, value in told.items()})
                assert len(told) == 3
            RunSpec.model_validate(spec)
