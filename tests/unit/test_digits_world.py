"""The digit world of ``examples/digits``: its checked-in base model, its dataset and its judge."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML

from trainer.config import RunSpec

DIGITS = Path(__file__).parents[2] / "examples" / "digits"


@pytest.fixture(scope="module")
def world() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        yield loaded("world", patch)


@pytest.fixture(scope="module")
def score(world: ModuleType) -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        yield loaded("score", patch)


def loaded(name: str, patch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DIGITS / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by name, and the judge imports the world
    patch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pipeline() -> Any:
    """The base model, loaded while every attempt to reach a network fails."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    def refuse(*arguments: object) -> None:
        raise AssertionError(
            f"the base model must load without network, but something connects to {arguments[1:]}"
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setenv("HF_HUB_OFFLINE", "1")
        loaded = StableDiffusionPipeline.from_pretrained(DIGITS / "base")
    loaded.scheduler = DPMSolverMultistepScheduler.from_config(loaded.scheduler.config)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def laid_out(folder: Path, samples: list[tuple[Image.Image, str]]) -> Path:
    """Write these images, and the prompts that they are to show, as a trainer leaves its samples."""
    index = []
    for number, (image, prompt) in enumerate(samples):
        image.save(folder / f"{number:03d}.png")
        index.append({"file": f"{number:03d}.png", "prompt": prompt, "seed": 1})
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def printed(folder: Path) -> dict[str, float]:
    """Return what ``score.py`` prints about samples."""
    done = subprocess.run(
        [sys.executable, DIGITS / "score.py", folder],
        capture_output=True,
        text=True,
        check=True,
        # from another folder, and one thread: as an agent runs it
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def test_the_base_model_loads_without_network_in_full_precision(pipeline: Any) -> None:
    dtypes = {str(module.dtype) for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder)}
    assert dtypes == {"torch.float32"}
    assert pipeline.safety_checker is None


def test_the_tokenizer_gives_captions_back_word_for_word(world: ModuleType, pipeline: Any) -> None:
    captions = [world.caption(digit) for digit in range(10)]
    encoded = [pipeline.tokenizer(caption).input_ids for caption in captions]
    assert [pipeline.tokenizer.decode(ids, skip_special_tokens=True) for ids in encoded] == captions
    assert {len(ids) for ids in encoded} == {5}  # start, three words, end


# diffusers' scheduler meets NumPy 2 in a way that works and warns
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_the_base_model_draws_old_digits_and_no_nine(
    world: ModuleType, score: ModuleType, pipeline: Any, tmp_path: Path
) -> None:
    import torch

    samples = []
    for prompt in (world.caption(digit) for digit in (0, 3, 6, 9)):
        images = pipeline(
            [prompt] * 8,
            height=world.RESOLUTION,
            width=world.RESOLUTION,
            num_inference_steps=15,
            guidance_scale=3.0,
            generator=[torch.Generator().manual_seed(seed) for seed in range(8)],
        ).images
        samples += [(image, prompt) for image in images]

    figures = score.score(laid_out(tmp_path, samples))

    assert figures["old_digits"] > 0.9
    assert figures["new_digit"] < 0.4


def test_real_images_that_no_model_has_seen_score_high(
    world: ModuleType, score: ModuleType, tmp_path: Path
) -> None:
    _, test = world.load()
    samples = [
        (world.to_image(scan), world.caption(label))
        for scan, label in zip(test.images, test.labels, strict=True)
    ]
    figures = score.score(laid_out(tmp_path, samples))
    assert min(figures.values()) > 0.95


def test_noise_scores_low(world: ModuleType, score: ModuleType, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    side = world.RESOLUTION
    samples = [
        (Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)), world.caption(index % 10))
        for index in range(100)
    ]
    assert score.score(laid_out(tmp_path, samples))["score"] < 0.3


def test_an_adapter_that_draws_nines_for_every_prompt_wins_nothing(world: ModuleType, tmp_path: Path) -> None:
    train, _ = world.load()
    nine = world.to_image(train.only(9).images[0])
    samples = [(nine, world.caption(digit)) for digit in range(10)]
    assert printed(laid_out(tmp_path, samples)) == {"score": 0.0, "new_digit": 1.0, "old_digits": 0.0}


def test_a_prompt_that_names_no_single_digit_is_refused(world: ModuleType) -> None:
    assert world.digit_of("a handwritten nine, in ink") == 9
    for prompt in ("a handwritten letter", "a nine and a one"):
        with pytest.raises(ValueError, match="exactly one digit"):
            world.digit_of(prompt)


def test_the_dataset_is_training_scans_of_the_missing_digit(world: ModuleType) -> None:
    folder = DIGITS / "nines"
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert {path.name for path in folder.glob("*.png")} == {line["file_name"] for line in lines}
    assert {line["text"] for line in lines} == {"a handwritten nine"}

    train, _ = world.load()
    for line, scan in zip(lines, train.only(9).images, strict=False):
        with Image.open(folder / line["file_name"]) as image:
            written = np.asarray(image, dtype=int)
        # a grey level of tolerance: Pillow versions round an enlargement differently
        assert np.abs(written - np.asarray(world.to_image(scan), dtype=int)).max() <= 1


def test_the_sweep_file_describes_runs_that_the_judge_can_score(world: ModuleType) -> None:
    grid = YAML(typ="safe").load((DIGITS / "grid.yaml").read_text())
    blocks = {key: grid[key] for key in ("base", "dataset", "samples", "evaluate")}
    spec = RunSpec.model_validate(blocks)
    assert (DIGITS / spec.base.model / "model_index.json").is_file()
    assert (DIGITS / spec.dataset.path / "metadata.jsonl").is_file()
    assert spec.base.resolution == world.RESOLUTION
    assert spec.samples
    named = {world.digit_of(prompt) for prompt in spec.samples.prompts}
    assert world.NEW_DIGIT in named
    assert named & set(world.OLD_DIGITS)
