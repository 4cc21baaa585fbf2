"""Adapter files of other programs become the start of a run, or part of its base."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import build_base
from torch import Tensor

from trainer.config import Base, MergedAdapter
from trainer.errors import BadInput
from trainer.families import load_family
from trainer.methods import Methods, attach
from trainer.methods.adapter_files import read_adapter_file
from trainer.methods.from_file import begin_with, put_onto
from trainer.methods.layers import adapted
from trainer.methods.module_names import sgm_names
from trainer.methods.targets import networks
from trainer.tensor_file import write

KOHYA = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("xl"), "sdxl")


def trained(base: Base) -> tuple[Methods, dict[str, Tensor]]:
    """An adapter whose every number is something."""
    methods = attach(base, load_family(base))
    for n, parameter in enumerate(methods.parameters.values()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(n))
        parameter.data += 0.05 * noise
    return methods, {name: p.detach().clone() for name, p in methods.parameters.items()}


def kohya(tensors: Mapping[str, Tensor], alpha: float, prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    """As kohya's scripts and LyCORIS write it."""
    found = {}
    for name, tensor in tensors.items():
        network, _, rest = name.partition(".")
        module, _, part = rest.removesuffix(".weight").rpartition(".")
        part += ".weight" if rest.endswith(".weight") else ""
        if part == "lora_magnitude_vector":
            part, tensor = "dora_scale", tensor.reshape(-1, *[1] * (max(tensor.ndim, 2) - 1))
        level = "text_model_" if network.startswith("text") and not module.startswith("text_model") else ""
        called = prefixes[network] + level + module.replace(".", "_")
        found[f"{called}.{KOHYA.get(part, part)}"] = tensor
        found[f"{called}.alpha"] = torch.tensor(alpha)
    return found


ONE = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"targets": "linear", "train_text_encoder": True},
    "dora": {"use_dora": True, "conv_rank": 4, "conv_alpha": 2.0},
    "loha": {"adapter": "loha", "conv_rank": 4, "conv_alpha": 2.0},
    "lokr": {"adapter": "lokr", "targets": "linear", "rank": 1, "alpha": 0.5, "lokr_factor": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_kohyas_names_gives_back_the_adapter(world: Path, tmp_path: Path, kind: str) -> None:
    base = Base(model=str(world / "base"), **{"rank": 4, "alpha": 2.0, **KINDS[kind]})
    _, tensors = trained(base)
    write(tmp_path / "a.safetensors", kohya(tensors, base.lora_alpha, ONE), {})
    family = load_family(base)
    methods = attach(base, family)
    begin_with(tmp_path / "a.safetensors", methods, family)
    for name, parameter in methods.parameters.items():
        assert torch.equal(parameter, tensors[name]), name


def test_stabilitys_names_of_blocks_are_known(xl: Path, tmp_path: Path) -> None:
    base = Base(model=str(xl), rank=2, targets="linear", conv_rank=2, train_text_encoder=True)
    _, tensors = trained(base)
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    family = load_family(base)
    sgm = sgm_names([name for name, _ in family.denoiser.named_modules()], 2)
    assert sgm["down_blocks.1.attentions.0.proj_in"] == "input_blocks.4.1.proj_in"
    assert sgm["up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.2.conv"
    named = {}
    for name, tensor in tensors.items():
        network, _, rest = name.partition(".")
        module = next((m for m in sgm if network == "unet" and rest.startswith(f"{m}.lora")), None)
        named[f"{network}.{sgm[module]}{rest.removeprefix(module)}" if module else name] = tensor
    assert len(named) == len(tensors)
    write(tmp_path / "a.safetensors", kohya(named, base.lora_alpha, prefixes), {})
    read = read_adapter_file(tmp_path / "a.safetensors", networks(family)).tensors
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_alpha_is_true(world: Path, tmp_path: Path) -> None:
    """diffusers' header says it; without, it is the rank. Another alpha begins as the same change."""
    base = Base(model=str(world / "base"), rank=4, alpha=2.0)
    _, tensors = trained(base)
    told = {"unet.r": 4, "unet.lora_alpha": 2.0, "unet.target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
    write(tmp_path / "told.safetensors", tensors, {"lora_adapter_metadata": json.dumps(told)})
    write(tmp_path / "untold.safetensors", tensors, {})
    other = Base(model=str(world / "base"), rank=4, alpha=4.0)
    name = next(name for name in tensors if "lora_B" in name)
    for file, factor in (("told", 0.5), ("untold", 1.0)):
        family = load_family(other)
        methods = attach(other, family)
        begin_with(tmp_path / f"{file}.safetensors", methods, family)
        assert torch.equal(methods.parameters[name], factor * tensors[name])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rank": 2}, "rank or base model differ"),
        ({"targets": "linear"}, "targets differ"),
        ({"use_dora": True}, "use_dora is False, the run's is True"),
        ({"adapter": "loha"}, "peft_type is LORA, the run's is LOHA"),
        ({"train_text_encoder": True}, "only the run trains one of the text_encoder"),
    ],
)
def test_an_adapter_that_a_run_cannot_go_on_from_is_refused(
    world: Path, tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    base = Base(model=str(world / "base"), rank=4)
    methods, tensors = trained(base)
    write(tmp_path / "a.safetensors", tensors, methods.metadata())
    other = base.model_copy(update=keys)
    family = load_family(other)
    with pytest.raises(BadInput, match=message):
        begin_with(tmp_path / "a.safetensors", attach(other, family), family)


def test_an_adapter_of_text_encoders_too_is_not_taken_for_another_bases(world: Path, tmp_path: Path) -> None:
    """A run that trains no text encoder has freed them by then."""
    base = Base(model=str(world / "base"), rank=4, train_text_encoder=True)
    _, tensors = trained(base)
    write(tmp_path / "a.safetensors", kohya(tensors, base.lora_alpha, ONE), {})
    plain = base.model_copy(update={"train_text_encoder": False})
    family = load_family(plain)
    family.free_text_encoders()
    with pytest.raises(BadInput, match="adapts text encoders too") as refused:
        begin_with(tmp_path / "a.safetensors", attach(plain, family), family)
    assert "train_text_encoder" in refused.value.hint


def test_a_header_sets_nothing_in_peft_that_is_not_known_here(world: Path, tmp_path: Path) -> None:
    base = Base(model=str(world / "base"), rank=4)
    methods, tensors = trained(base)
    header = methods.metadata()
    configs = json.loads(header["config"])
    configs["unet"] |= {"megatron_config": {"a": 1}, "megatron_core": "somebody.elses"}
    write(tmp_path / "a.safetensors", tensors, header | {"config": json.dumps(configs)})
    roots = networks(load_family(base))
    file = read_adapter_file(tmp_path / "a.safetensors", roots)
    with pytest.raises(BadInput, match="its header says megatron_config, which is not known here"):
        put_onto(file, roots, "given", tmp_path / "a.safetensors")


def test_a_file_of_another_base_is_refused(world: Path, xl: Path, tmp_path: Path) -> None:
    base = Base(model=str(xl), rank=2, train_text_encoder=True)
    methods, tensors = trained(base)
    write(tmp_path / "a.safetensors", tensors, methods.metadata())
    with pytest.raises(BadInput, match="this base model has no module text_encoder_2"):
        read_adapter_file(tmp_path / "a.safetensors", networks(load_family(Base(model=str(world / "base")))))


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_adapter_is_part_of_the_base(world: Path, tmp_path: Path, kind: str) -> None:
    base = Base(model=str(world / "base"), **{"rank": 4, "alpha": 2.0, **KINDS[kind]})
    _, tensors = trained(base)
    write(tmp_path / "a.safetensors", kohya(tensors, base.lora_alpha, ONE), {})
    plain = Base(model=str(world / "base"))
    adapted = load_family(base)
    methods = attach(base, adapted)
    begin_with(tmp_path / "a.safetensors", methods, adapted)
    methods.use()
    path = str(tmp_path / "a.safetensors")
    merged, half, untouched = (
        load_family(plain.model_copy(update={"merged_adapters": given}))
        for given in ((MergedAdapter(path=path),), (MergedAdapter(path=path, weight=0.5),), ())
    )
    ids = [untouched.token_ids("a dog")]
    noisy = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found, before = (
            family.predict(noisy, torch.tensor([500]), family.encode_tokens(ids))
            for family in (adapted, merged, untouched)
        )
    assert (found - expected).abs().max() < 1e-4 * (expected - before).abs().max()
    whole, part, none = (dict(f.denoiser.state_dict()) for f in (merged, half, untouched))
    assert whole.keys() == none.keys(), "nothing of the adapter is left"
    for name, weight in none.items():
        assert torch.allclose(part[name] - weight, 0.5 * (whole[name] - weight), atol=1e-6)
    assert (merged.text_identity() == untouched.text_identity()) == (kind != "lora")


@pytest.mark.parametrize(
    "made", [{"algo": "loha", "use_tucker": True}, {"algo": "lokr", "decompose_both": True, "factor": -1}]
)
def test_a_file_that_lycoris_wrote_changes_weights_as_lycoris_does(
    world: Path, tmp_path: Path, made: dict[str, Any]
) -> None:
    lycoris = pytest.importorskip("lycoris")
    root = load_family(Base(model=str(world / "base"))).denoiser
    lycoris.LycorisNetwork.apply_preset({"target_module": ["Transformer2DModel", "ResnetBlock2D"]})
    network = lycoris.create_lycoris(
        root, 1.0, linear_dim=2, linear_alpha=1.0, conv_dim=2, conv_alpha=0.5, **made
    )
    network.apply_to()
    for n, parameter in enumerate(network.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(n))
    saved = {k.replace("lycoris_", "lora_unet_"): t.detach() for k, t in network.state_dict().items()}
    network.restore()
    write(tmp_path / "a.safetensors", saved, {})
    put_onto(read_adapter_file(tmp_path / "a.safetensors", {"unet": root}), {"unet": root}, "x", tmp_path)
    layers = {name.replace(".", "_"): layer for name, layer in adapted(root)}
    assert len(layers) == len(network.loras) > 100
    for module in network.loras:
        found = layers[module.lora_name.removeprefix("lycoris_")].get_delta_weight("x")
        expected = module.get_weight(found.shape).reshape(found.shape)
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_down.weight": (4, 32), "lora_up.weight": (32, 4), "alpha": (2,)}, r"alpha of .* shape \[2\]"),
        ({"lora_down.weight": (4, 32), "lora_up.weight": (32, 3)}, "does not fit"),
        ({"lora_down.weight": (4,), "lora_up.weight": (32, 4)}, "expected a matrix"),
        ({"lokr_w1_b": (4, 4), "lokr_w2": (8, 8)}, "lokr_w1_b has no lokr_w1_a"),
    ],
)
def test_a_damaged_file_is_refused_by_its_module(
    world: Path, tmp_path: Path, tensors: dict[str, tuple[int, ...]], message: str
) -> None:
    module = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    write(tmp_path / "a.safetensors", {f"{module}.{part}": torch.ones(s) for part, s in tensors.items()}, {})
    with pytest.raises(BadInput, match=message):
        read_adapter_file(tmp_path / "a.safetensors", networks(load_family(Base(model=str(world / "base")))))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("[1]", "is damaged"),
        ('{"unet.r": "four", "unet.lora_alpha": 1}', "lora_adapter_metadata: r: "),
        ('{"unet.r": 4}', "lora_adapter_metadata: lora_alpha: Field required"),
    ],
)
def test_a_damaged_header_is_refused(world: Path, tmp_path: Path, header: str, message: str) -> None:
    base = Base(model=str(world / "base"), rank=4)
    _, tensors = trained(base)
    write(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": header})
    with pytest.raises(BadInput, match=message):
        read_adapter_file(tmp_path / "a.safetensors", networks(load_family(base)))
