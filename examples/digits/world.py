"""The digit world: 1,797 real handwritten digits, of which the base model has never seen a nine.

The images are scikit-learn's copy of the UCI "Optical Recognition of Handwritten Digits" test set, 8x8
pixels with values 0 to 16; they ship inside the package, so nothing is downloaded. Here they become small
RGB images, dark ink on white paper, with captions; and here they are split, once and for all, into what
models may train on and what only judges see.

``python world.py nines`` writes the sweep's dataset again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RESOLUTION = 32
"""Side of an image in pixels: four times that of the scans; Stable Diffusion's code wants a multiple of 8."""

NEW_DIGIT = 9
"""The digit that the base model has not seen, and a LoRA is to teach it."""

OLD_DIGITS = tuple(digit for digit in range(10) if digit != NEW_DIGIT)

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_SCAN_SIDE = 8
_SCAN_MAX = 16.0


@dataclass(frozen=True, slots=True)
class Scans:
    """Scanned digits and what they are."""

    images: NDArray[np.float64]
    """(N, 8, 8), ink from 0 (paper) to 16."""
    labels: NDArray[np.int64]
    """(N,), 0 to 9."""

    def only(self, *digits: int) -> Scans:
        """Return the scans of these digits, in their order."""
        import numpy as np

        chosen = np.isin(self.labels, digits)
        return Scans(self.images[chosen], self.labels[chosen])


def load() -> tuple[Scans, Scans]:
    """Return the training and the test scans: every fifth scan is for testing.

    By position and not by chance, so that the split is the same with every version of every library.
    """
    import numpy as np
    from sklearn.datasets import load_digits

    digits = load_digits()
    test = np.arange(len(digits.target)) % 5 == 0
    return (
        Scans(digits.images[~test], digits.target[~test]),
        Scans(digits.images[test], digits.target[test]),
    )


def to_image(scan: NDArray[np.float64]) -> Image.Image:
    """Return one 8x8 scan as an RGB image at the model's resolution."""
    import numpy as np

    paper = np.rint(255.0 * (1.0 - scan / _SCAN_MAX)).astype(np.uint8)
    return Image.fromarray(paper).resize((RESOLUTION, RESOLUTION), Image.Resampling.BICUBIC).convert("RGB")


def to_scan(image: Image.Image) -> NDArray[np.float64]:
    """Return an image of any size as an 8x8 scan: the way back from ``to_image``, but for its slight blur."""
    import numpy as np

    small = image.convert("L").resize((_SCAN_SIDE, _SCAN_SIDE), Image.Resampling.BOX)
    return _SCAN_MAX * (1.0 - np.asarray(small, dtype=np.float64) / 255.0)


def caption(digit: int) -> str:
    return f"a handwritten {WORDS[digit]}"


def digit_of(text: str) -> int:
    """Return the digit that a caption or prompt names.

    Raises:
        ValueError: If it names none, or more than one.
    """
    named = [WORDS.index(word) for word in text.lower().replace(",", " ").split() if word in WORDS]
    if len(named) != 1:
        raise ValueError(
            f"prompt {text!r} must name exactly one digit as a word, from {WORDS[0]!r} to {WORDS[-1]!r}"
        )
    return named[0]


def write_dataset(folder: Path, digit: int = NEW_DIGIT, count: int | None = None) -> int:
    """Write the first ``count`` (default: all) training scans of a digit as a dataset; return how many.

    That is PNG files and a ``metadata.jsonl`` with their captions: what a sweep's ``dataset.path`` names.
    """
    train, _ = load()
    scans = train.only(digit).images[:count]
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, scan in enumerate(scans):
        name = f"{index:03d}.png"
        to_image(scan).save(folder / name, optimize=True)
        lines.append(json.dumps({"file_name": name, "text": caption(digit)}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return len(scans)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write images of one digit as a dataset for a sweep.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--digit", type=int, choices=range(10), default=NEW_DIGIT)
    parser.add_argument("--count", type=int, default=128)
    arguments = parser.parse_args()
    written = write_dataset(arguments.folder, arguments.digit, arguments.count)
    print(f"{arguments.folder}: {written} images of {caption(arguments.digit)!r}")
