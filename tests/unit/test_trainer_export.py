"""Exported files give back the adapter, and sample images are what diffusers would draw."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from support.adapters import adapted_checkpoint
from support.tiny_world import tiny_spec

from storage.local import staged_checkpoint
from trainer.config import RunSpec
from trainer.errors import BadCheckpoint, BadInput
from trainer.export import (
    Dtype,
    ExportFailed,
    Form,
    Trained,
    trained_adapter,
    verify_export,
    write_weights,
)
from trainer.sample import sample_images
from trainer.tensor_file import read, to_bytes

# diffusers' schedulers hand torch tensors to numpy in the old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROMPT, SEEDS = "a photo of a rufus", (1, 2)


@pytest.fixture(scope="module")
def spec(world: Path) -> RunSpec:
    return tiny_spec(
        world / "base",
        world / "images",
        base={"max_train_steps": 3, "learning_rate": 5e-2, "alpha": 12.0},
        dataset={"trigger": "rufus"},
        samples={"prompts": ["a photo of a [trigger]"], "negative": "blurry", "seeds": SEEDS, "steps": 3},
    )


@pytest.fixture(scope="module")
def checkpoint(spec: RunSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes images visibly; alpha is three times the rank."""
    return adapted_checkpoint(spec, tmp_path_factory.mktemp("trained"), size=0.1)


@pytest.fixture(scope="module")
def trained(spec: RunSpec, checkpoint: Path) -> Trained:
    return trained_adapter(checkpoint, spec)


def images(folder: Path) -> np.ndarray:
    index = json.loads((folder / "index.json").read_text())
    return np.stack([np.asarray(Image.open(folder / row["file"])) for row in index]).astype(int)


def drawn_by_diffusers(spec: RunSpec, lora: Path | None) -> np.ndarray:
    """The same prompt, seeds and settings through the pipeline that a user has."""
    pipeline = StableDiffusionPipeline.from_pretrained(spec.base.model, safety_checker=None)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    if lora:
        pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
    pipeline.set_progress_bar_config(disable=True)
    drawn = [
        pipeline(
            PROMPT,
            negative_prompt="blurry",
            num_inference_steps=3,
            guidance_scale=7.5,
            height=32,
            width=32,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        for seed in SEEDS
    ]
    return np.stack([np.asarray(image) for image in drawn]).astype(int)


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_an_exported_file_draws_the_run_s_own_samples_in_diffusers(
    form: Form, spec: RunSpec, checkpoint: Path, trained: Trained, tmp_path: Path
) -> None:
    exported = write_weights(trained, tmp_path / "cat", form)
    ours = images(sample_images(spec, checkpoint, tmp_path / "ours"))
    bare = images(sample_images(spec, None, tmp_path / "bare"))

    theirs = drawn_by_diffusers(spec, exported)

    assert (
        exported.name == {"diffusers": "pytorch_lora_weights.safetensors", "kohya": "cat.safetensors"}[form]
    )
    assert abs(theirs - ours).max() <= 1, "one level in 255, from another order of sums"
    assert abs(theirs - bare).max() > 20, "the adapter does nothing, so this would prove nothing"
    assert abs(drawn_by_diffusers(spec, None) - bare).max() <= 1


@pytest.mark.parametrize(("form", "dtype"), [("diffusers", "fp32"), ("diffusers", "bf16"), ("kohya", "fp16")])
def test_exports_verify(form: Form, dtype: Dtype, trained: Trained, tmp_path: Path) -> None:
    exported = write_weights(trained, tmp_path / "cat", form, dtype=dtype)
    again = write_weights(trained, tmp_path / "other" / "cat", form, dtype=dtype)

    found = verify_export(exported, trained)

    assert (found["modules"], found["rank"], found["alpha"], found["dtype"]) == (128, 4, 12.0, dtype)
    assert found["max_weight_error"] <= {"fp32": 0.0, "fp16": 2e-3, "bf16": 2e-2}[dtype]
    assert exported.read_bytes() == again.read_bytes()


def hardly_trained(checkpoint: Path, folder: Path, factor: float) -> Path:
    """The checkpoint with every ``B`` made smaller."""
    tensors, metadata = read(checkpoint / "adapter.safetensors")
    with staged_checkpoint(folder, 3, metrics={}, final=True) as staged:
        small = {name: tensor * (factor if "lora_B" in name else 1) for name, tensor in tensors.items()}
        save_file(small, staged / "adapter.safetensors", metadata)
        (staged / "state.json").write_bytes((checkpoint / "state.json").read_bytes())
    return folder / "step-000000003"


@pytest.mark.parametrize("factor", [1e-9])
def test_an_adapter_that_is_hardly_trained_verifies_and_another_in_its_place_does_not(
    factor: float, spec: RunSpec, checkpoint: Path, trained: Trained, tmp_path: Path
) -> None:
    """Its numbers lie where fp16 has few digits, or none, which is no reason to refuse it."""
    small = trained_adapter(hardly_trained(checkpoint, tmp_path / "small", factor), spec)
    exported = write_weights(small, tmp_path / "cat", "kohya", dtype="fp16")
    other = write_weights(trained, tmp_path / "other", "kohya", dtype="fp16")

    assert verify_export(exported, small)["modules"] == 128
    with pytest.raises(ExportFailed, match="differs from the checkpoint"):
        verify_export(other, small)


def test_kohya_files_say_alpha_and_only_what_may_be_said(
    spec: RunSpec, trained: Trained, tmp_path: Path
) -> None:
    tensors, metadata = read(write_weights(trained, tmp_path / "cat", "kohya", dtype="fp16"))
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"

    assert tensors[f"{module}.alpha"] == 12.0
    assert tensors[f"{module}.lora_down.weight"].shape == (4, 8)
    assert tensors[f"{module}.lora_up.weight"].shape == (8, 4)
    assert metadata["ss_network_dim"] == "4"
    assert metadata["ss_network_alpha"] == "12.0"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert metadata["modelspec.trigger_phrase"] == "rufus"
    assert len(metadata["sshs_model_hash"]) == 64
    assert str(Path(spec.base.model).parent) not in json.dumps(metadata)
    assert "number 1" not in json.dumps(metadata), "a caption leaked"


def spoil(path: Path, change: str) -> None:
    tensors = load_file(path)
    _, metadata = read(path)
    name = next(name for name in sorted(tensors) if "lora_up" in name or "lora_B" in name)
    match change:
        case "lost":
            del tensors[name]
        case "scaled":
            tensors[name] *= 1.5
        case "nan":
            tensors[name][0, 0] = float("nan")
        case "alpha":
            metadata = {key: value.replace("12.0", "4.0") for key, value in metadata.items()}
            tensors = {
                key: torch.tensor(4.0) if key.endswith("alpha") else tensor for key, tensor in tensors.items()
            }
        case "renamed":
            tensors["x" + name] = tensors.pop(name)
    path.write_bytes(to_bytes(tensors, metadata))


@pytest.mark.parametrize(
    ("form", "change"),
    [("diffusers", "lost"), ("diffusers", "alpha")]
    + [("kohya", change) for change in ("scaled", "nan", "alpha", "renamed")],
)
@pytest.mark.filterwarnings("ignore")  # diffusers warns of the very keys that were spoilt
def test_a_spoilt_file_does_not_verify(form: Form, change: str, trained: Trained, tmp_path: Path) -> None:
    exported = write_weights(trained, tmp_path / "cat", form)
    spoil(exported, change)

    with pytest.raises(ExportFailed):
        verify_export(exported, trained)


def test_numbers_too_large_for_fp16_are_refused(trained: Trained, tmp_path: Path) -> None:
    first, *others = trained.modules
    huge = {part: tensor + 1e6 for part, tensor in first.tensors.items()}
    enlarged = replace(trained, modules=(replace(first, tensors=huge), *others))

    with pytest.raises(BadInput, match="numbers too large for fp16"):
        write_weights(enlarged, tmp_path / "cat", "kohya", dtype="fp16")


def test_an_adapter_of_another_rank_is_refused(spec: RunSpec, checkpoint: Path, tmp_path: Path) -> None:
    other = spec.model_copy(update={"base": spec.base.model_copy(update={"rank": 2})})

    with pytest.raises(BadCheckpoint, match="has shape"):
        sample_images(other, checkpoint, tmp_path / "out")


def test_samples_go_into_an_empty_folder_only(spec: RunSpec, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")

    with pytest.raises(BadInput, match="is not empty"):
        sample_images(spec, None, tmp_path)


def test_an_image_does_not_depend_on_its_companions(spec: RunSpec, world: Path, tmp_path: Path) -> None:
    assert spec.samples
    alone = spec.model_copy(update={"samples": spec.samples.model_copy(update={"seeds": (2,)})})

    together = images(sample_images(spec, None, tmp_path / "together"))
    single = images(sample_images(alone, None, tmp_path / "alone"))

    assert abs(together[1] - single[0]).max() <= 1
