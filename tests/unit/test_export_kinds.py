"""Every kind of adapter predicts the same when another program reads its file: LyCORIS and diffusers."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from safetensors.torch import load_file
from support.adapters import adapted_checkpoint
from support.tiny_models import build_base
from support.tiny_world import tiny_spec

from trainer.config import Base, RunSpec
from trainer.errors import BadInput
from trainer.export import Trained, trained_adapter, verify_export, write_weights
from trainer.export.modules import networks
from trainer.export.trained import outputs_of
from trainer.families import load_family
from trainer.families.source import load_pipeline
from trainer.rundir import ADAPTER
from trainer.sample import sample_images
from trainer.weights.writing import convert

# diffusers' schedulers hand torch tensors to numpy in the old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SOME = {"targets": ["to_k", "proj_in", "conv2"], "train_text_encoder": True}
"""Linear layers, convolutions with kernels of 1 and of 3, and text encoders."""
KINDS: dict[str, dict[str, Any]] = {
    "locon": {"conv_rank": 2, "conv_alpha": 3.0, **SOME},
    "rslora": {"use_rslora": True, "targets": ["to_k"]},
    "dora": {"use_dora": True, **SOME},
    "loha": {"adapter": "loha", **SOME},
    "lokr": {"adapter": "lokr", **SOME},
}


@functools.cache
def base(family: str, root: Path) -> Path:
    return build_base(root / family, family)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kinds")


@functools.cache
def exported_kind(family: str, kind: str, root: Path) -> tuple[RunSpec, Path, Trained]:
    keys = {"lora_dropout": 0.0, "alpha": 6.0, **KINDS[kind]}
    samples = {"prompts": ["a photo of a dog"], "negative": "blurry", "seeds": [1], "steps": 2}
    spec = tiny_spec(base(family, root), root, base=keys, samples=samples)
    checkpoint = adapted_checkpoint(spec, root / f"{family}-{kind}", size=0.1)
    return spec, checkpoint, trained_adapter(checkpoint, spec)


@functools.cache
def without(model: str) -> dict[str, torch.Tensor]:
    return outputs_of(load_family(Base(model=model)))


def read_by_lycoris(file: Path, spec: RunSpec) -> dict[str, torch.Tensor]:
    """What the base says with the file's adapter, each of its modules made and computed by LyCORIS."""
    from lycoris.modules import get_module, make_module

    family, tensors = load_family(spec.base), load_file(file)
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
    if "text_encoder_2" in family.text_encoders:
        prefixes |= {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    found = {}
    for network, module in networks(family).items():
        # Names of text encoders are those from before transformers 5.
        level = "text_model." if network.startswith("text") and not hasattr(module, "text_model") else ""
        for name, layer in module.named_modules():
            found[prefixes[network] + (level + name).replace(".", "_")] = layer
    for name in sorted({key.partition(".")[0] for key in tensors}):
        made = make_module(*get_module(tensors, name), name, found[name])
        made.multiplier = 1.0
        made.apply_to()
        made.eval()
    return outputs_of(family)


@pytest.mark.parametrize(
    ("family", "kind"),
    [*(("sd1", kind) for kind in KINDS), ("sdxl", "locon")],
)
def test_lycoris_reads_the_same_adapter(family: str, kind: str, root: Path, tmp_path: Path) -> None:
    """As exported with its base at hand, and as converted from names alone: they hold the same."""
    spec, checkpoint, trained = exported_kind(family, kind, root)
    file = write_weights(trained, tmp_path / "cat", "kohya")
    converted = convert(checkpoint / ADAPTER, tmp_path / "converted.safetensors", "kohya")
    exported, tensors = load_file(file), load_file(converted)
    assert tensors.keys() == exported.keys()
    # Two whole factors of LoKr have no rank, and nobody reads their alpha.
    unread = {key.replace(".lokr_w2", ".alpha") for key in tensors if key.endswith(".lokr_w2")}
    assert {key for key, tensor in tensors.items() if not torch.equal(tensor, exported[key])} <= unread

    read = read_by_lycoris(converted, spec)
    bare = without(spec.base.model)

    assert verify_export(file, trained)["modules"] == len(trained.modules)
    for name, expected in trained.outputs.items():
        size = expected.abs().max()
        assert (read[name] - expected).abs().max() <= 1e-4 * size
        if name == "prediction" or spec.base.train_text_encoder:
            assert (bare[name] - expected).abs().max() > 1e-2 * size, (
                "it changes nothing: this proves nothing"
            )


@pytest.mark.parametrize(
    ("family", "kind", "form"), [("sdxl", "locon", "kohya"), ("sd1", "dora", "diffusers")]
)
def test_diffusers_draws_the_run_s_image(
    family: str, kind: str, form: Any, root: Path, tmp_path: Path
) -> None:
    spec, checkpoint, trained = exported_kind(family, kind, root)
    file = write_weights(trained, tmp_path / "cat", form)
    ours = sample_images(spec, checkpoint, tmp_path / "ours") / "p00-s1.png"

    drawn = _drawn(spec, file)

    expected = np.asarray(Image.open(ours)).astype(int)
    assert abs(drawn - expected).max() <= 1, "one level in 255, from another order of sums"
    assert abs(_drawn(spec, None) - expected).max() > 10


def _drawn(spec: RunSpec, file: Path | None) -> Any:
    pipeline = load_pipeline(Base(model=spec.base.model))
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    if file:
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    image = pipeline(
        "a photo of a dog",
        negative_prompt="blurry",
        num_inference_steps=2,
        guidance_scale=7.5,
        height=32,
        width=32,
        generator=torch.Generator().manual_seed(1),
    ).images[0]
    return np.asarray(image).astype(int)


def test_of_sd3_there_is_diffusers_form_with_the_scale_folded_in_if_need_be(
    root: Path, tmp_path: Path
) -> None:
    spec = tiny_spec(base("sd3", root), root, base={"lora_dropout": 0.0, "alpha": 6.0})
    trained = trained_adapter(adapted_checkpoint(spec, root / "sd3-lora", size=0.1), spec)

    with pytest.raises(BadInput, match="another implementation"):
        write_weights(trained, tmp_path / "cat", "kohya")
    verify_export(write_weights(trained, tmp_path / "cat", "diffusers"), trained)
    verify_export(write_weights(trained, tmp_path / "cat", "diffusers", fold=True), trained)


def test_diffusers_is_told_what_it_cannot_read(root: Path, tmp_path: Path) -> None:
    _, _, trained = exported_kind("sd1", "loha", root)

    with pytest.raises(BadInput, match="diffusers loads no loha"):
        write_weights(trained, tmp_path / "cat", "diffusers")
