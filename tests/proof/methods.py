"""Every method of training, as a tiny run of each in one tiny world."""

from pathlib import Path
from typing import Any

from support.tiny_control import add_conditions, build_control
from support.tiny_world import build_base, build_images, tiny_spec

from trainer.config import RunSpec

STEPS = 4

EIGHT_BIT: dict[str, Any] = {"optimizer": "adamw8bit", "adam8bit_min_size": 64}
"""Of the tiny matrices most have 8-bit state then, some do not."""
TEXTS: dict[str, Any] = {"train_text_encoder": True, "text_encoder_learning_rate": 5e-4}
WORDS: dict[str, Any] = {
    "images": "words",
    "tokens": [{"token": "<sks>", "words": "dog dog"}, {"token": "<b>", "init": "noise"}],
    "token_learning_rate": 1e-2,
}
PIVOT: dict[str, Any] = {"tokens_until": 0.5, "adapter_from": 0.5}
ADAPTED_WORDS = ["textual_inversion", "adapter"]
CLASS_IMAGES = {"prompt": "a dog", "images": 8, "steps": 3}


def build_world(folder: Path) -> None:
    """Write what the runs are made from."""
    build_base(folder / "base")
    build_control(folder / "base", folder / "control")
    build_images(folder / "images")
    build_images(folder / "words", of="<sks>, <b>")
    add_conditions(build_images(folder / "controlled"))


def methods(world: Path) -> dict[str, RunSpec]:
    """Return a run of each method, by name."""

    def run(images: str = "images", blocks: dict[str, Any] | None = None, **base: Any) -> RunSpec:
        short = {"max_train_steps": STEPS, "gradient_accumulation_steps": 1}
        return tiny_spec(world / "base", world / images, base=short | base, **blocks or {})

    control = {"model": str(world / "control")}
    return {
        "lora": run(**EIGHT_BIT, gradient_accumulation_steps=2, ema_decay=0.9),
        "locon": run(targets="linear", conv_rank=2, conv_alpha=1.0, optimizer="lion"),
        "dora": run(use_dora=True, lora_dropout=0.0),
        "loha": run(adapter="loha", conv_rank=2, lora_dropout=0.0),
        "lokr": run(adapter="lokr", rank=2, lokr_factor=4, lora_dropout=0.0),
        "text encoder": run(**TEXTS, optimizer="adafactor"),
        "words": run(**WORDS, train="textual_inversion", rank=8, alpha=None, lora_dropout=0.0),
        "pivotal": run(**WORDS, **PIVOT, **EIGHT_BIT, train=ADAPTED_WORDS, ema_decay=0.9),
        "words and LoRA": run(**WORDS, **TEXTS, train=ADAPTED_WORDS),
        "hypernetwork": run(train="hypernetwork", hypernetwork_dropout=0.2),
        "full": run(**TEXTS, **EIGHT_BIT, train="full", mixed_precision="bf16"),
        "int8": run(quantize="int8"),
        "nf4": run(**EIGHT_BIT, quantize="nf4", mixed_precision="bf16"),
        "fp8": run(quantize="fp8", gradient_checkpointing=True),
        # Of more samples than a shard of what is computed beforehand: a kill finds some that are whole.
        "hollow": run(hollow=2, train_batch_size=5, gradient_accumulation_steps=4),
        "control": run("controlled", {"dataset": {"control": "files"}}, control=control),
        "class images": run(**EIGHT_BIT, blocks={"prior": CLASS_IMAGES}, ema_decay=0.9),
    }
