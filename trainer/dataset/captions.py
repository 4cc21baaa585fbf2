"""What the files of a folder say of its images: ``metadata.jsonl``, ``metadata.csv``, and ``x.txt``.

``metadata.jsonl`` has one object a line, ``metadata.csv`` a row, with ``file_name`` and ``text``, ``prompt``
or ``caption``; it wins over ``x.txt`` or ``x.caption`` beside ``x.png``.
"""

import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

METADATA = ("metadata.jsonl", "metadata.csv")
CAPTION_KEYS = ("text", "prompt", "caption")
CAPTION_SUFFIXES = (".txt", ".caption")


def captions_in(folder: Path, images: Mapping[str, Path]) -> tuple[dict[str, str], list[str]]:
    """Return the captions that files give, by image, and what is wrong with these files.

    Args:
        images: By their paths inside the folder.
    """
    captions: dict[str, str] = {}
    found: list[str] = []
    for name, path in images.items():
        for suffix in CAPTION_SUFFIXES:
            beside = path.with_suffix(suffix)
            if beside.is_file():
                try:
                    captions[name] = beside.read_text("utf-8").strip()
                except UnicodeDecodeError:
                    found.append(f"{beside.name}: not UTF-8")
                break
    metadata = [folder / name for name in METADATA if (folder / name).is_file()]
    if not metadata:
        return captions, found + _shared_stems(images)
    if len(metadata) > 1:
        found.append(f"there are both {' and '.join(METADATA)}: keep one")
    listed: dict[str, str] = {}
    for where, row in _rows(metadata[0]):
        try:
            name, caption = _read(row, images)
            if name in listed:
                raise ValueError(f"{name} is listed twice")
            listed[name] = caption
        except ValueError as error:
            found.append(f"{where}: {error}")
    return captions | listed, found


def _rows(metadata: Path) -> Iterator[tuple[str, object]]:
    """Yield where each row stands, and the row, or the error that it cannot be read."""
    if metadata.suffix == ".csv":
        try:
            text = metadata.read_bytes().decode("utf-8-sig")
            reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
            for row in reader:
                yield f"{metadata.name} line {reader.line_num}", row
        except (ValueError, csv.Error) as error:
            yield metadata.name, ValueError(f"not CSV in UTF-8: {error}")
        return
    for number, line in enumerate(metadata.read_bytes().splitlines(), start=1):
        if line.strip():
            yield f"{metadata.name} line {number}", _json(line)


def _json(line: bytes) -> object:
    try:
        return json.loads(line)
    except ValueError as error:
        return ValueError(f"not JSON: {error}")


def _read(row: object, images: Mapping[str, Path]) -> tuple[str, str]:
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise ValueError('expected an object with "file_name" and "text"')
    name = PurePosixPath(row["file_name"])
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(f"file_name {row['file_name']!r} leaves the dataset folder")
    if str(name) not in images:
        raise ValueError(f"{name} is not an image in the folder")
    caption = next((row[key] for key in CAPTION_KEYS if key in row), None)
    if not isinstance(caption, str):
        raise ValueError(f"{name} has no {', '.join(CAPTION_KEYS[:-1])} or {CAPTION_KEYS[-1]}")
    return str(name), caption.strip()


def _shared_stems(images: Mapping[str, Path]) -> list[str]:
    by_stem: dict[str, list[str]] = defaultdict(list)
    for name, path in images.items():
        by_stem[str(PurePosixPath(name).with_suffix(""))].append(path.name)
    return [
        f"{' and '.join(names)} share one caption file, {Path(names[0]).stem}.txt: rename one"
        for names in by_stem.values()
        if len(names) > 1
    ]
