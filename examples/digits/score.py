"""Judge sample images: ``python score.py SAMPLES`` prints, as its last line, one JSON object of numbers.

``SAMPLES`` holds images and ``index.json``, a list of objects such as
``{"file": "000.png", "prompt": "a handwritten nine", "seed": 1}``. A support-vector classifier, fitted on
the real training scans in a second, says which digit each image shows; a sample is right if that is the
digit its prompt names.

    new_digit    share of the nines that are right: has the new digit been learned?
    old_digits   share of all others that are right: have the old ones been kept?
    score        the harmonic mean of the two, 2ab / (a + b)

The harmonic mean is close to the smaller of the two: an adapter that draws nines for every prompt is worth
nothing, and so is one that has not learned at all. If the prompts name only old digits, or only nines, the
share at hand is the score.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import world
from PIL import Image


class Judge:
    """Says which digit an image shows, having learned from real training scans as they look in this world."""

    def __init__(self) -> None:
        import numpy as np
        from sklearn.svm import SVC

        train, _ = world.load()
        # Through the image and back: the blur of the enlargement must not be what tells samples from scans.
        scans = np.stack([world.to_scan(world.to_image(scan)) for scan in train.images])
        self._classifier = SVC(gamma=0.001).fit(scans.reshape(len(scans), -1), train.labels)

    def digit(self, image: Image.Image) -> int:
        return int(self._classifier.predict(world.to_scan(image).reshape(1, -1))[0])


def harmonic_mean(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b else 0.0


def score(folder: Path) -> dict[str, float]:
    """Return the figures of a folder of samples.

    Raises:
        ValueError: If the folder has no samples, or a prompt names no digit.
    """
    index = json.loads((folder / "index.json").read_text())
    if not index:
        raise ValueError(f"{folder / 'index.json'} names no samples")
    judge = Judge()
    right: dict[bool, list[bool]] = {}
    for entry in index:
        wanted = world.digit_of(entry["prompt"])
        with Image.open(folder / entry["file"]) as image:
            right.setdefault(wanted == world.NEW_DIGIT, []).append(judge.digit(image) == wanted)
    shares = {is_new: sum(each) / len(each) for is_new, each in right.items()}
    figures = {"score": harmonic_mean(*shares.values()) if len(shares) == 2 else next(iter(shares.values()))}
    if True in shares:
        figures["new_digit"] = shares[True]
    if False in shares:
        figures["old_digits"] = shares[False]
    return figures


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python score.py SAMPLES   (a folder of images with an index.json)")
    print(json.dumps(score(Path(sys.argv[1]))))
