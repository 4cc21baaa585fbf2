"""A frozen ControlNet's residuals go into training and validation, as diffusers itself puts them there."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from pydantic import ValidationError
from support.tiny_control import add_conditions, build_control
from support.tiny_models import build_base
from support.tiny_world import tiny_spec
from support.training import Lay, contents, events, interrupted, newest
from torch import Tensor

from trainer.attempt import prepare, run_attempt
from trainer.config import Base, Dataset
from trainer.config.control import Control
from trainer.dataset.folder import contents_of
from trainer.dataset.images import edges
from trainer.dataset.survey import problems
from trainer.errors import BadInput
from trainer.families import Family, load_family
from trainer.families.latent import frozen
from trainer.families.stable_diffusion import UNetFamily
from trainer.rundir import EXIT_COMPLETE
from trainer.spec_inputs import inputs_of, moved, pinned
from trainer.stop import Stop

# Of diffusers' sampler, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def controlled(world: Path) -> Path:
    """The world with ControlNets and condition images."""
    build_control(world / "base", world / "control")
    build_control(world / "base", world / "zero", size=0.0)
    add_conditions(world / "images")
    return world


def given_to(family: Family) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    numbers = torch.Generator().manual_seed(1)
    told = family.encode_tokens([family.token_ids("a dog"), family.token_ids("")])
    told |= family.size_conditioning(torch.tensor([[32.0, 32, 0, 8, 32, 32]] * 2))
    noisy = torch.randn((2, 4, 4, 4), generator=numbers)
    seen = torch.randint(256, (2, 3, 32, 32), generator=numbers, dtype=torch.uint8)
    return noisy, torch.tensor([20, 700]), told, seen


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_predictions_are_those_of_diffusers_own_control(tmp_path: Path, name: str) -> None:
    base = build_base(tmp_path / "base", name)
    folder = build_control(base, tmp_path / "control")
    family = load_family(Base(model=str(base)))
    assert isinstance(family, UNetFamily)
    family.inject(Control(model=str(folder), scale=0.7))
    noisy, timesteps, told, seen = given_to(family)
    added = {"text_embeds": told["pooled"], "time_ids": told["time_ids"]} if name == "sdxl" else None
    network = frozen(ControlNetModel.from_pretrained(folder), family.device)  # its place decides last bits
    with torch.no_grad():
        down, middle = network(
            *(noisy, timesteps, told["states"], seen.float() / 255, 0.7),
            added_cond_kwargs=added,
            return_dict=False,
        )
        expected = family.denoiser(
            *(noisy, timesteps, told["states"]),
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            added_cond_kwargs=added,
        ).sample
        found = family.predict(noisy, timesteps, told | family.control_conditioning(seen))
        without = family.predict(noisy, timesteps, told)

    assert torch.equal(found, expected)
    assert not torch.allclose(found, without)


def test_zero_convolutions_change_nothing(controlled: Path) -> None:
    family = load_family(Base(model=str(controlled / "base")))
    family.inject(Control(model=str(controlled / "zero")))
    noisy, timesteps, told, seen = given_to(family)

    found = family.predict(noisy, timesteps, told | family.control_conditioning(seen))

    assert torch.equal(found, family.predict(noisy, timesteps, told))


def test_stopped_equals_never_stopped(controlled: Path, lay: Lay) -> None:
    """Beside class images, which have no condition image, and with validation on the way."""
    base = {"control": {"model": str(controlled / "control")}, "max_train_steps": 2, "train_batch_size": 1}
    spec = tiny_spec(
        *(controlled / "base", controlled / "images"),
        base=base,
        dataset={"control": "files"},
        prior={"prompt": "a dog", "images": 2, "steps": 1},
        validation={"every": 1, "timesteps": 1},
    )
    straight, first, second = interrupted(lay, spec, 1)
    plain = lay("plain", spec.model_copy(update=_without_control(spec)))
    assert run_attempt(plain, Stop()) == EXIT_COMPLETE

    assert contents(newest(second)) == contents(newest(straight))
    seen, of_plain = ([e["val/loss"] for e in events(r, "validation")] for r in (straight, plain))
    assert seen == [e["val/loss"] for part in (first, second) for e in events(part, "validation")]
    assert seen != of_plain
    assert "control" not in "".join(contents(newest(straight)))


def _without_control(spec: Any) -> dict[str, Any]:
    return {
        "base": spec.base.model_copy(update={"control": None}),
        "dataset": spec.dataset.model_copy(update={"control": "none"}),
    }


@pytest.mark.parametrize("center", [True, False])
def test_what_is_seen_is_cut_and_mirrored_as_the_image_is(controlled: Path, lay: Lay, center: bool) -> None:
    """The condition image is the image: so are their mirrored halves, and where each crop lies in it."""
    spec = tiny_spec(
        *(controlled / "base", controlled / "images"),
        base={"control": {"model": str(controlled / "zero")}},
        dataset={
            "control": "files",
            "center_crop": center,
            "buckets": True,
            "bucket_min": 16,
            "bucket_max": 64,
            "bucket_step": 8,
        },
    )
    parts = prepare(lay(f"run-{center}", spec), Stop())
    crops = set()
    for sample in parts.training.samples(range(24)):
        assert sample.control_3HW is not None
        top, left, height, width = (int(side) for side in sample.size_6[2:])
        assert sample.control_3HW.shape == (3, height, width)
        assert sample.x0_CHW.shape[1:] == (height // 8, width // 8)
        crops.add((top, left))
    for image in parts.training._images:
        one, other = (view.control_3HW for view in image.views)
        assert one is not None
        assert other is not None
        assert torch.equal(one, other.flip(-1)) or (one.int() - other.flip(-1).int()).abs().max() <= 2
    assert len(crops) > 1 or center


def test_a_crop_of_latents_is_a_crop_of_pixels() -> None:
    from trainer.data import View, controlled
    from trainer.families import Posterior

    pixels = torch.arange(3 * 32 * 40).reshape(3, 32, 40)
    view = View(Posterior(torch.zeros(4, 4, 5), torch.zeros(4, 4, 5)), control_3HW=pixels)

    seen = controlled(view, (2, 3), (1, 2), 8)

    assert seen is not None
    assert torch.equal(seen, pixels[:, 8:24, 16:40])


def test_edges_are_of_the_image(controlled: Path) -> None:
    image = Image.new("RGB", (16, 16))
    image.paste((255, 255, 255), (8, 0, 16, 16))

    found = np.array(edges(image))

    assert found[4:12, 7:9].max() == 255
    assert found[:, :6].max() == found[:, 10:].max() == 0
    assert found[:, 8].min() == 0  # no frame


def test_conditions_that_are_missing_odd_or_of_another_size_are_named(
    controlled: Path, tmp_path: Path
) -> None:
    images = shutil.copytree(controlled / "images", tmp_path / "images")
    (images / "03.control.png").rename(images / "nobody.control.png")
    Image.new("RGB", (8, 8)).save(images / "01.control.png")
    dataset = Dataset(path=str(images), control="files")

    said = " ".join(contents_of(dataset, images).problems)
    assert "1 of 6 images have no condition image x.control.png beside x.png: 03.png" in said
    assert "nobody.control.png is a condition image, but the image" in said
    assert any("condition image has 8×8 pixels, its image 40×32" in problem for problem in problems(dataset))
    assert len(contents_of(Dataset(path=str(images)), images).examples) == 6


def test_the_controlnet_is_an_input_of_the_run(controlled: Path) -> None:
    spec = tiny_spec(
        *(controlled / "base", controlled / "images"),
        base={"control": {"model": str(controlled / "control")}},
        dataset={"control": "edges"},
    )
    (named,) = (each for each in inputs_of(spec) if each.what == "ControlNet")

    digest = named.content(controlled / "control").digest
    fixed = pinned(spec, {named.path: digest})
    assert named.key == "base.control.model"
    assert fixed.base.control is not None
    assert fixed.base.control.digest == digest
    there = moved(fixed, {digest: "/there"}).base.control
    assert there is not None
    assert there.model == "/there"


@pytest.mark.parametrize(
    ("base", "dataset", "said"),
    [
        ({"control": {"model": "m"}}, {}, "it has nothing to see"),
        ({}, {"control": "edges"}, "name one in base.control"),
        ({"control": {"model": "m"}, "hollow": 1}, {"control": "edges"}, "leave one of the two out"),
        ({"control": {"model": "m", "scale": 0}}, {"control": "edges"}, "base.control.scale"),
        ({"control": {"model": "m", "what": 0}}, {"control": "edges"}, "base.control.what"),
    ],
)
def test_what_cannot_be_is_refused(base: dict[str, Any], dataset: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said.replace(".", r"\.")):
        tiny_spec(Path("m"), Path("d"), base=base, dataset=dataset)


def test_a_controlnet_of_another_family_is_refused(controlled: Path, tmp_path: Path) -> None:
    control = Control(model=str(controlled / "control"))
    sdxl = load_family(Base(model=str(build_base(tmp_path / "sdxl", "sdxl"))))
    with pytest.raises(BadInput, match="no ControlNet of this base: its cross_attention_dim is 32"):
        sdxl.inject(control)
    sd3 = load_family(Base(model=str(build_base(tmp_path / "sd3", "sd3"))))
    with pytest.raises(BadInput, match="has no UNet"):
        sd3.inject(control)
    sd1 = load_family(Base(model=str(controlled / "base")))
    for model, why in (
        (controlled / "base" / "unet", "is a UNet2DConditionModel"),
        (tmp_path / "none", "is no folder"),
    ):
        with pytest.raises(BadInput, match=why):
            sd1.inject(Control(model=str(model)))
