"""PEFT reads what is written for it, and what PEFT and diffusers write of one network is read."""

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.adapters import write_adapter
from support.tiny_models import build_base
from torch import Tensor, nn

from trainer.__main__ import main as trainer
from trainer.config import Base
from trainer.errors import BadInput
from trainer.export.modules import AdaptedModule, adapted_modules
from trainer.families import load_family
from trainer.methods.adapter_files import read_adapter_file
from trainer.methods.layers import adapted
from trainer.methods.targets import networks
from trainer.weights.combining import Ranks, mixed, resized
from trainer.weights.inspecting import inspect
from trainer.weights.lora_file import read_lora
from trainer.weights.writing import convert, write_lora

KINDS: dict[str, dict[str, Any]] = {
    "locon": {"rank": 4, "alpha": 2.0, "conv_rank": 3, "conv_alpha": 1.0, "train_text_encoder": True},
    "dora": {"rank": 2, "alpha": 1.0, "use_dora": True, "train_text_encoder": True},
    "loha": {"rank": 2, "alpha": 1.0, "adapter": "loha"},
    "lokr": {"rank": 2, "alpha": 1.0, "adapter": "lokr", "lokr_factor": 4, "targets": "linear"},
}
QUERY = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
PAIR = {f"{QUERY}.lora_A.weight": torch.ones(2, 6), f"{QUERY}.lora_B.weight": torch.ones(5, 2)}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "target_modules": ["to_q"]}


DEPRECATED = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
"""PEFT asks transformers 5 for it."""


@pytest.fixture(scope="module")
def roots(built: Path) -> Mapping[str, nn.Module]:
    """The untouched networks of a base, to be copied."""
    return networks(load_family(Base(model=str(built / "base"))))


def changes(path: Path) -> dict[tuple[str, str], Tensor]:
    return {(m.network, m.name): m.change_OI() for m in read_lora(path).modules}


def onto(roots: Mapping[str, nn.Module], folder: Path) -> dict[tuple[str, str], AdaptedModule]:
    """The adapters that PEFT makes of a folder's networks."""
    found = {}
    for own in folder.iterdir():
        model = PeftModel.from_pretrained(deepcopy(roots[own.name]), own)
        modules = adapted_modules({own.name: model.get_base_model()}, "default")
        found |= {(module.network, module.name): module for module in modules}
    return found


@DEPRECATED
def test_modules_are_called_as_in_the_models_of_sd3(tmp_path: Path) -> None:
    base = build_base(tmp_path / "base", "sd3")
    ours = write_adapter(base, tmp_path / "ours.safetensors", rank=2, train_text_encoder=True)
    folder = convert(ours, tmp_path / "peft", "peft")
    on_model = onto(networks(load_family(Base(model=str(base)))), folder)
    assert {network for network, _ in on_model} == {"transformer", "text_encoder", "text_encoder_2"}
    was = load_file(ours)
    for (network, name), module in on_model.items():
        for part, tensor in module.tensors.items():
            assert torch.equal(tensor, was.pop(f"{network}.{name}.{part}"))
    assert not was


@DEPRECATED
@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_what_is_written_for_it_and_writes_it_as_it_was(
    roots: Mapping[str, nn.Module], built: Path, tmp_path: Path, kind: str
) -> None:
    ours = write_adapter(built / "base", tmp_path / "ours.safetensors", **KINDS[kind])
    folder = convert(ours, tmp_path / "peft", "peft")
    expected = changes(ours)
    assert {network for network, _ in expected} == {own.name for own in folder.iterdir()}
    for own in folder.iterdir():
        model = PeftModel.from_pretrained(deepcopy(roots[own.name]), own)
        on_model = {m.name: m for m in adapted_modules({own.name: model.get_base_model()}, "default")}
        assert on_model.keys() == {name for network, name in expected if network == own.name}
        for name, module in on_model.items():
            assert torch.allclose(module.change_OI(), expected[own.name, name], rtol=1e-6, atol=1e-9), name
        model.save_pretrained(tmp_path / "by-peft" / own.name)
    read = read_lora(tmp_path / "by-peft")
    assert (read.form, read.family) == ("peft", read_lora(ours).family)
    assert all(torch.equal(change, expected[m, n]) for (m, n), change in changes(read.path).items())
    back = convert(read.path, tmp_path / "back.safetensors", "ours")
    was, found = load_file(ours), load_file(back)
    assert was.keys() == found.keys()
    assert all(torch.equal(was[key], found[key]) for key in was)
    assert all(torch.equal(change, expected[place]) for place, change in changes(back).items())
    again = convert(back, tmp_path / "again", "peft")
    for file in sorted(folder.rglob("*.*")):
        assert (again / file.relative_to(folder)).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=["to_q", "to_k", "conv1"],
            rank_pattern={"attn2.to_q": 2},
            alpha_pattern={r"^mid_block\.resnets\.\d\.conv1": 1},
            use_rslora=True,
        ),
        LoraConfig(r=2, lora_alpha=3, target_modules=r"mid_block\..*to_[qv]", use_dora=True),
        LoHaConfig(r=2, alpha=1, target_modules=["to_q", "conv1"], use_effective_conv2d=False),
        LoKrConfig(r=2, alpha=1, target_modules=["to_q"], decompose_both=True, decompose_factor=4),
    ],
    ids=["rslora", "dora", "loha", "lokr"],
)
def test_what_peft_was_told_is_understood(
    roots: Mapping[str, nn.Module], tmp_path: Path, config: PeftConfig
) -> None:
    model = get_peft_model(deepcopy(roots["unet"]), config)
    numbers = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=numbers)
    model.save_pretrained(tmp_path / "any-name")
    expected = {m.name: m.change_OI() for m in adapted_modules({"unet": model.get_base_model()}, "default")}
    for path in (tmp_path / "any-name", tmp_path / "any-name" / "adapter_model.safetensors"):
        found = changes(path)
        assert found.keys() == {("unet", name) for name in expected}
        assert all(torch.allclose(found["unet", n], e, rtol=1e-6) for n, e in expected.items())
    to_train = read_adapter_file(tmp_path / "any-name", roots)
    assert to_train.configs["unet"]["target_modules"] == sorted(expected)
    assert {name.split(".lora_")[0].split(".hada_")[0].split(".lokr_")[0] for name in to_train.tensors} == {
        f"unet.{name}" for name in expected
    }


def test_what_diffusers_writes_of_one_network_is_read(roots: Mapping[str, nn.Module], tmp_path: Path) -> None:
    unet: Any = deepcopy(roots["unet"])
    unet.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False))
    unet.save_lora_adapter(tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    expected = {name: layer.get_delta_weight("default") for name, layer in adapted(unet)}
    found = changes(file)
    assert found.keys() == {("unet", name) for name in expected}
    assert all(torch.allclose(found["unet", n], e, rtol=1e-5, atol=1e-7) for n, e in expected.items())
    converted = convert(file, tmp_path / "kohya.safetensors", "kohya")
    assert all(torch.equal(change, found[place]) for place, change in changes(converted).items())
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(file), bare)  # without a header alpha is the rank
    assert all(torch.allclose(c, 2 * found[p], rtol=1e-6) for p, c in changes(bare).items())


def put(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / "adapter_model.safetensors")
    if config:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_which_text_encoder_it_is_the_folder_says_or_what_was_adapted(tmp_path: Path) -> None:
    layer = "base_model.model.text_model.encoder.layers.0.mlp.fc1"
    fc1 = {f"{layer}.lora_A.weight": torch.ones(2, 6), f"{layer}.lora_B.weight": torch.ones(5, 2)}
    for folder, adapted_model, network in (
        ("one", None, "text_encoder"),
        ("text_encoder_2", None, "text_encoder_2"),
        ("two", "some/where/text_encoder_2", "text_encoder_2"),
        ("unet", None, "text_encoder"),
    ):
        put(tmp_path / folder, fc1, **CONFIG, base_model_name_or_path=adapted_model)
        (module,) = read_lora(tmp_path / folder).modules
        assert (module.network, module.scale) == (network, 0.5)
    assert inspect(tmp_path / "two")["size_bytes"] > 100


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "adapter_config.json beside it, which says alpha, cannot be read"),
        ({**CONFIG, "r": "four"}, "adapter_config.json: PEFT's configuration: r: "),
        ({**CONFIG, "r": 4}, "to_q has rank 2, its header says 4"),
        ({**CONFIG, "peft_type": "IA3"}, "PEFT's configuration: peft_type: "),
        ({"peft_type": "LORA", "r": 2}, "PEFT's configuration says no lora_alpha"),
        (
            {**CONFIG, "init_lora_weights": "pissa_niter_4"},
            "begun with pissa_niter_4, which changes the base",
        ),
    ],
)
def test_a_folder_that_does_not_say_what_it_changes_is_refused(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    folder = put(tmp_path / "unet", PAIR, **config)
    with pytest.raises(BadInput, match=message):
        read_lora(folder / "adapter_model.safetensors")


def test_tools_take_and_write_folders_and_replace_nothing_else(tmp_path: Path) -> None:
    lora = read_lora(put(tmp_path / "a", PAIR, **CONFIG))
    twice = mixed([(lora, 1.0), (lora, 1.0)])
    out = write_lora(resized(twice, Ranks(rank=1)), tmp_path / "out")
    assert torch.allclose(changes(out)["unet", lora.modules[0].name], torch.full((5, 6), 2.0))
    with pytest.raises(BadInput, match="is there already"):
        write_lora(lora, out)
    assert write_lora(lora, out, force=True) == out
    assert read_lora(out).modules[0].rank == 2
    for words in (["resize", str(out), "--rank", "1"], ["mix", str(out), f"{out}:0.5", "--to", "peft"]):
        said = CliRunner().invoke(trainer, ["lora", *words, "--out", str(tmp_path / words[0])])
        assert said.exit_code == 0, said.output
        assert read_lora(tmp_path / words[0]).form == "peft"
    (out / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match="more than an adapter of PEFT's"):
        write_lora(lora, out, force=True)
    assert (out / "notes.txt").read_text() == "mine"
    with pytest.raises(BadInput, match="PEFT's form is a folder"):
        write_lora(lora, tmp_path / "a.safetensors", "peft")
    with pytest.raises(BadInput, match="is a folder, and none of PEFT's"):
        read_lora(tmp_path)
