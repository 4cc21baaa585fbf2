"""Full fine-tuning: what is trained is the network itself, in fp32, and an interrupted run ends in the same
bytes; what is exported is a whole model."""

import errno
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import DiffusionPipeline
from pydantic import ValidationError
from support.adapters import adapted_checkpoint
from support.tiny_models import build_base
from support.tiny_world import tiny_spec
from support.training import Lay, contents, interrupted, newest

from trainer.attempt import prepare
from trainer.config import Base, RunSpec
from trainer.errors import BadInput
from trainer.export.checkpoint import Wanted, export_checkpoint
from trainer.export.pipeline_folder import INDEX, appearing, write_pipeline
from trainer.families import load_family
from trainer.generate import Wish, generate
from trainer.methods import attach
from trainer.sample import trained_on_base
from trainer.step import Stepper, in_training
from trainer.stop import Stop
from trainer.tensor_file import read

# Of diffusers' sampler, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TEXTS: dict[str, Any] = {"train_text_encoder": True, "text_encoder_learning_rate": 5e-4}


def spec_of(world: Path, model: Path | None = None, **keys: Any) -> RunSpec:
    base = {"train": "full", "max_train_steps": 2, "gradient_accumulation_steps": 1, **keys}
    blocks = {"prior": base.pop("prior")} if "prior" in base else {}
    return tiny_spec(model or world / "base", world / "images", base=base, **blocks)


def test_what_is_trained_are_the_network_s_own_weights_in_fp32(world: Path, lay: Lay) -> None:
    parts = prepare(lay("run", spec_of(world, mixed_precision="bf16", **TEXTS)), Stop())
    unet, encoder = parts.family.denoiser, parts.family.text_encoders["text_encoder"]
    own = {f"unet.{name}": parameter for name, parameter in unet.named_parameters()}
    own |= {f"text_encoder.{name}": parameter for name, parameter in encoder.named_parameters()}
    assert parts.methods.parameters.keys() == own.keys()
    assert all(parts.methods.parameters[name] is parameter for name, parameter in own.items())
    assert {parameter.dtype for parameter in own.values()} == {torch.float32}
    before = {name: parameter.detach().clone() for name, parameter in own.items()}
    in_training(parts.family, parts.methods)
    Stepper(parts, None).take(0)

    assert not [name for name in before if torch.equal(before[name], own[name])]


def test_layers_that_no_text_is_read_from_are_left_alone(tmp_path: Path) -> None:
    """SDXL reads the layer before the last of its first encoder."""
    base = Base(model=str(build_base(tmp_path / "xl", "sdxl")), train="full", train_text_encoder=True)
    names = attach(base, load_family(base)).parameters.keys()
    first = {name for name in names if name.startswith("text_encoder.")}
    assert any("layers.0." in name for name in first)
    assert not any("layers.1." in name or "final_layer_norm" in name for name in first)
    assert any(name.startswith("text_encoder_2.") and "layers.1." in name for name in names)


@pytest.mark.parametrize(
    "keys",
    [
        {"optimizer": "adamw8bit", "adam8bit_min_size": 64, "mixed_precision": "bf16", **TEXTS},
        {
            "optimizer": "adafactor",
            "ema_decay": 0.9,
            "gradient_checkpointing": True,
            "prior": {"prompt": "a dog", "images": 2, "steps": 1},
        },
    ],
    ids=["adamw8bit-bf16-text", "adafactor-ema-class-images"],
)
def test_stopped_equals_never_stopped(world: Path, lay: Lay, keys: dict[str, Any]) -> None:
    spec = spec_of(world, **keys)
    straight, _, again = interrupted(lay, spec, 1)

    assert contents(newest(again)) == contents(newest(straight))
    trained, header = read(newest(again) / "adapter.safetensors")
    assert header["method"] == "full"
    has_texts = any(name.startswith("text_encoder.") for name in trained)
    assert has_texts == ("train_text_encoder" in keys)


def test_a_whole_model_comes_out_which_diffusers_loads_and_draws_the_same(
    world: Path, tmp_path: Path
) -> None:
    samples = {"prompts": ["a dog"], "steps": 2}
    spec = tiny_spec(world / "base", world / "images", base={"train": "full", **TEXTS}, samples=samples)
    checkpoint = adapted_checkpoint(spec, tmp_path / "trained", size=0.01)
    (one,) = export_checkpoint(checkpoint, spec, tmp_path / "cat", Wanted(to="hf", name="cat"))
    assert one.path == tmp_path / "cat"
    assert one.found["tensors"] == len(read(checkpoint / "adapter.safetensors")[0])
    assert "A full fine-tuning, text encoder too, of base" in (one.path / "README.md").read_text()

    pipeline = DiffusionPipeline.from_pretrained(one.path)
    family, _ = trained_on_base(spec.base, checkpoint)
    noisy = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    said = family.encode_tokens([family.token_ids("a dog")])
    theirs = pipeline.unet(noisy, 500, pipeline.encode_prompt("a dog", "cpu", 1, False)[0]).sample
    torch.testing.assert_close(theirs, family.predict(noisy, torch.tensor([500]), said), rtol=1e-4, atol=1e-6)
    bare = load_family(Base(model=spec.base.model))
    assert not torch.allclose(theirs, bare.predict(noisy, torch.tensor([500]), said), atol=1e-3)

    wish = Wish(prompts=("a dog",), steps=2, resolution=32)
    from_folder = generate(one.path, None, wish, tmp_path / "1")[0].read_bytes()
    assert generate(checkpoint, spec.base, wish, tmp_path / "2")[0].read_bytes() == from_folder


def test_what_is_no_model_is_neither_replaced_nor_written(world: Path, tmp_path: Path) -> None:
    spec = spec_of(world)
    checkpoint = adapted_checkpoint(spec, tmp_path / "trained", size=0.01)
    with pytest.raises(BadInput, match="not as one file for A1111"):
        export_checkpoint(checkpoint, spec, tmp_path / "cat", Wanted(to="a1111", name="cat"))
    (tmp_path / "cat").mkdir()
    with pytest.raises(BadInput, match="it is not replaced"):
        export_checkpoint(checkpoint, spec, tmp_path / "cat", Wanted(to="diffusers", name="cat"))
    with pytest.raises(BadInput, match="holds the weights of a whole model"):
        generate(checkpoint, None, Wish(prompts=("a dog",), model=spec.base.model), tmp_path / "drawn")


class FullDisk:
    """A pipeline for which the disk has no room once it has written a part."""

    components: ClassVar[dict[str, Any]] = {}

    def save_pretrained(self, folder: Path, **how: Any) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "half").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_fills_up_costs_neither_the_folder_before_nor_any_room(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / INDEX).write_text("{}")

    with pytest.raises(BadInput, match="No space left"):
        write_pipeline(FullDisk(), tmp_path / "cat")

    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == [
        "cat",
        f"cat/{INDEX}",
    ]


def test_a_folder_that_cannot_be_replaced_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cat = tmp_path / "cat"
    cat.mkdir()
    (cat / "old").write_text("old")
    rename = Path.rename

    def refused(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(BadInput, match="Input/output error"), appearing(cat) as new:
        (new / "file").write_text("new")

    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == [
        "cat",
        "cat/old",
    ]


def test_a_base_that_others_work_with_is_not_changed(world: Path) -> None:
    adapter, full = Base(model=str(world / "base")), Base(model=str(world / "base"), train="full")
    family = load_family(adapter)
    attach(adapter, family)
    with pytest.raises(ValueError, match="another run works with this base"):
        attach(full, family)
    alone = attach(full, load_family(full))
    with pytest.raises(BadInput, match="nothing is kept of them"), alone.aside():
        pass


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"rank": 4}, "base.rank is of adapter, but base.train is full: leave rank out"),
        ({"initial_adapter": "a.safetensors"}, "base.initial_adapter is of adapter"),
        ({"hypernetwork_dropout": 0.1}, "base.hypernetwork_dropout is of hypernetwork"),
        ({"train": ["full", "adapter"]}, "full changes all of the base, adapter is trained beside"),
        ({"train": ["hypernetwork", "full"]}, "full changes all of the base, hypernetwork is trained beside"),
        (
            {"prior": {"prompt": "a dog", "online": True}},
            "set prior.online to false, to train on class images",
        ),
    ],
)
def test_what_cannot_work_is_refused(keys: dict[str, Any], said: str) -> None:
    base = {"model": "m", "train": "full", **keys}
    blocks = {"prior": base.pop("prior")} if "prior" in base else {}
    with pytest.raises(ValidationError, match=said):
        RunSpec.model_validate({"base": base, "dataset": {"path": "d"}, **blocks})
