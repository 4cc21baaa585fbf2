"""What a test trains with: a base model in miniature (``tiny_models``), images, and a run of a few steps."""

import json
from pathlib import Path
from typing import Any

from PIL import Image
from support.tiny_models import build_base, build_tokenizer

from trainer.config import RunSpec

__all__ = ["build_base", "build_images", "build_tokenizer", "tiny_spec"]


def build_images(
    folder: Path, *, count: int = 6, size: tuple[int, int] = (40, 32), of: str = "a dog"
) -> Path:
    """Write ``count`` different gradients with captions in a ``metadata.jsonl`` that say what they are of."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        image = Image.new("RGB", size)
        image.putdata(
            [
                ((x * 7 + index * 40) % 256, (y * 5 + index * 25) % 256, (x * y) % 256)
                for y in range(size[1])
                for x in range(size[0])
            ]
        )
        image.save(folder / f"{index:02d}.png")
        lines.append(
            json.dumps({"file_name": f"{index:02d}.png", "text": f"a photo of {of}, number {index}"})
        )
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def tiny_spec(
    base_folder: Path,
    images: Path,
    *,
    base: dict[str, Any] | None = None,
    dataset: dict[str, Any] | None = None,
    **blocks: Any,
) -> RunSpec:
    """A run of a few steps that uses accumulation, dropout, caption dropout and flips."""
    trained = (base or {}).get("train", "adapter")
    adapter = {"rank": 4, "alpha": 8.0, "lora_dropout": 0.1}
    return RunSpec.model_validate(
        {
            "base": {
                "model": str(base_folder),
                **(adapter if "adapter" in trained else {}),
                "resolution": 32,
                "max_train_steps": 6,
                "train_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "learning_rate": 1e-3,
                "lr_scheduler": "cosine",
                "lr_warmup_steps": 1,
                "seed": 3,
                **(base or {}),
            },
            "dataset": {
                "path": str(images),
                "caption_dropout": 0.2,
                "random_flip": True,
                "center_crop": False,
                "val_fraction": 0.2,
                **(dataset or {}),
            },
            "validation": {"every": 0, "timesteps": 4},
            **blocks,
        }
    )
