"""Base models: from a folder, a file, or nowhere, and what is wrong with them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.single_file import write_single_file
from support.tiny_world import build_base, tiny_spec
from support.training import Lay

from trainer.attempt import prepare
from trainer.config import Base
from trainer.errors import BadInput
from trainer.families import load_family
from trainer.stop import Stop

# diffusers' schedulers hand torch tensors to numpy in the old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def fake_index(folder: Path) -> None:
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))


def only_pickles(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(
        folder / "unet" / "diffusion_pytorch_model.bin"
    )


def not_a_number(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_in.bias"][0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "changes", "said"),
    [
        (fake_index, {}, "is a FluxPipeline; no model of this class can be trained"),
        (only_pickles, {}, "cannot be loaded: "),
        (not_a_number, {}, "unet conv_in.bias holds NaN or infinity"),
        (None, {"targets": ["to_nothing"]}, "fit no module of"),
        (None, {"mixed_precision": "fp16"}, "fp16 needs a CUDA device"),
        (None, {"model": "./nowhere"}, "./nowhere: no such file or folder"),
        (None, {"model": "a/b/c"}, "neither a local path nor a model on the hub"),
    ],
)
def test_bad_base_models(
    spoil: Callable[[Path], None] | None,
    changes: dict[str, Any],
    said: str,
    world: Path,
    lay: Lay,
    tmp_path: Path,
) -> None:
    base = world / "base"
    if spoil:
        base = build_base(tmp_path / "base")
        spoil(base)

    with pytest.raises(BadInput) as caught:
        prepare(lay("run", tiny_spec(base, world / "images", base=changes)), Stop())

    assert said in str(caught.value)


def test_a_single_file_is_the_same_model_as_its_folder(world: Path, tmp_path: Path) -> None:
    """Offline it needs the configuration of its family in a folder of the same name."""
    model = write_single_file(world / "base", tmp_path / "model.safetensors")
    shutil.copytree(world / "base", tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))

    single, folder = (load_family(Base(model=str(path))) for path in (model, world / "base"))

    assert single.text_identity() == folder.text_identity()
    assert single.image_identity() == folder.image_identity()
    assert single.token_ids("a dog") == folder.token_ids("a dog")
    weights, expected = single.denoiser.state_dict(), folder.denoiser.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert torch.equal(single.process.alpha_bar_T, folder.process.alpha_bar_T)


def test_without_network_a_message_says_what_to_bring(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = write_single_file(world / "base", tmp_path / "model.safetensors")

    with pytest.raises(BadInput) as caught:
        load_family(Base(model=str(model)), tmp_path / "hub")
    assert "put a folder of the same name" in caught.value.hint
    with pytest.raises(BadInput, match="neither a local path nor in the local hub cache") as caught:
        load_family(Base(model="owner/name"), tmp_path / "hub")
    assert "hf download" in caught.value.hint


def test_a_pickled_checkpoint_file_is_never_read(lay: Lay, world: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.ckpt"
    model.write_bytes(b"\x80\x04.")

    with pytest.raises(BadInput, match=r"only \.safetensors files are read, never pickles"):
        prepare(lay("run", tiny_spec(model, world / "images")), Stop())
