"""Sample images of several adapters side by side, as one PNG: same prompts, same seeds."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

MARGIN, LABEL, CELL = 6, 22, 48


def contact_sheet(columns: Mapping[str, Path], target: Path, seeds_shown: int = 6) -> Path:
    """Write a picture with a block of images per column title and a row per prompt.

    Args:
        columns: Title to folder of samples, each with an ``index.json``. Images that one folder has and
            another lacks are left out.
        seeds_shown: At most so many images per prompt, by the first seeds.
    """
    from PIL import Image, ImageDraw

    folders = {title: _by_prompt(folder) for title, folder in columns.items()}
    prompts = [p for p in next(iter(folders.values())) if all(p in images for images in folders.values())]
    seeds = min((len(images[p]) for images in folders.values() for p in prompts), default=0)
    shown = min(seeds, seeds_shown)
    label_width = max((len(p) for p in prompts), default=0) * 7 + 2 * MARGIN
    block = shown * CELL + MARGIN
    size = (label_width + block * len(folders), LABEL + len(prompts) * (CELL + MARGIN))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, (title, images) in enumerate(folders.items()):
        left = label_width + column * block
        draw.text((left, MARGIN), title, fill="black")
        for row, prompt in enumerate(prompts):
            top = LABEL + row * (CELL + MARGIN)
            draw.text((MARGIN, top + CELL // 2 - 6), prompt, fill="black")
            for n, file in enumerate(images[prompt][:shown]):
                sheet.paste(_tile(file), (left + n * CELL, top))
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    target.write_bytes(buffer.getvalue())
    return target


def _by_prompt(folder: Path) -> dict[str, Sequence[Path]]:
    found: dict[str, list[Path]] = {}
    for entry in json.loads((folder / "index.json").read_text()):
        found.setdefault(entry["prompt"], []).append(folder / Path(entry["file"]).name)
    return dict(found)


def _tile(file: Path) -> "Image":
    from PIL import Image

    with Image.open(file, formats=["PNG"]) as image:
        return image.convert("RGB").resize((CELL - 2, CELL - 2), Image.Resampling.NEAREST)
