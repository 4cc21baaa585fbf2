"""A base in fewer bits: what is stored, what is computed with it, and that a run on it is like any other."""

import sys
from pathlib import Path
from typing import Any, Literal

import bitsandbytes.functional as bnb
import pytest
import torch
from support.adapters import adapted_checkpoint
from support.tiny_world import build_base, tiny_spec
from support.training import Lay, contents, interrupted, newest
from torch import Tensor, nn

from trainer.config import Base
from trainer.errors import BadInput
from trainer.export import trained_adapter, verify_export
from trainer.export.files import write_weights
from trainer.families import Family, load_family
from trainer.families.quantized import Kind, QuantizedConv2d, QuantizedLinear, quantize
from trainer.methods import attach
from trainer.rundir import ADAPTER

# Of diffusers' sampler, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

KINDS: tuple[Kind, ...] = ("int8", "nf4", "fp8")
CPU = torch.device("cpu")
LATENTS = torch.linspace(-1, 1, 2 * 4 * 8 * 8).reshape(2, 4, 8, 8)
ERRORS = {"int8": 0.02, "nf4": 0.2, "fp8": 0.2}
"""Of a prediction of the tiny UNet, relative to that of the plain one: twice what was measured."""


def small(kind: Kind) -> tuple[nn.Sequential, nn.Sequential]:
    """Two layers as they were and quantised; of the second only fp8 changes anything."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        plain = nn.Sequential(nn.Conv2d(6, 10, 3, stride=2, padding=1), nn.Flatten(2), nn.Linear(16, 24))
    other = nn.Sequential(nn.Conv2d(6, 10, 3, stride=2, padding=1), nn.Flatten(2), nn.Linear(16, 24))
    other.load_state_dict(plain.state_dict())
    for network in (plain, other):
        network.requires_grad_(False)
    quantize(other, kind, CPU)
    return plain, other


def predicted(family: Family) -> Tensor:
    text = family.encode_tokens([family.token_ids("a dog")] * 2)
    with torch.no_grad():
        return family.predict(LATENTS, torch.tensor([10, 900]), text)


def quantized_layers(network: nn.Module) -> dict[str, nn.Module]:
    kinds = (QuantizedLinear, QuantizedConv2d)
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, kinds)}


def test_the_numbers_are_those_of_bitsandbytes() -> None:
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(0))
    restored: dict[Kind, Tensor] = {}
    for kind in KINDS[:2]:
        layer = nn.Linear(128, 24, bias=False)
        layer.weight.data = weight.clone()
        quantize(nn.Sequential(layer), kind, CPU)
        restored[kind] = layer.weight

    numbers, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    torch.testing.assert_close(restored["nf4"], bnb.dequantize_4bit(numbers, state))
    rows, scales, _ = bnb.int8_vectorwise_quant(weight.half())
    step = scales[:, None] / 127  # theirs rounds to half precision before
    assert ((restored["int8"] - rows * step).abs() <= 1.01 * step).all()
    assert ((restored["int8"] - weight).abs() <= 0.51 * step).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_computes_and_differentiates_with_the_weight_that_it_names(kind: Kind) -> None:
    plain, other = small(kind)
    plain[0].weight.data, plain[2].weight.data = other[0].weight, other[2].weight
    given = torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(2))
    results = []
    for network in (plain, other):
        leaf = given.clone().requires_grad_()
        out = network(leaf)
        out.square().sum().backward()
        results.append((out.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_a_layer_computes_in_bf16_whatever_it_is_given(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, other = small(kind)
    for theirs, ours in ((plain[0], other[0]), (plain[2], other[2])):
        theirs.weight.data = ours.weight
    ordinary, brought_back = QuantizedLinear.restored, []

    def seen_restored(layer: QuantizedLinear, dtype: torch.dtype) -> Tensor:
        brought_back.append(dtype)
        return ordinary(layer, dtype)

    monkeypatch.setattr("trainer.families.quantized._Quantized.restored", seen_restored)
    results = []
    for network in (plain, other):
        leaf = torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            seen = [network[0](leaf), network[2](leaf.detach().flatten(2)[..., :16])]
        assert {out.dtype for out in seen} == {torch.bfloat16}
        seen[0].float().square().sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.dtype is torch.float32
        results.append((*seen, leaf.grad))
    torch.testing.assert_close(results[0], results[1])
    assert set(brought_back) == {torch.bfloat16}, "in fp32 a weight would take twice the memory"


@pytest.mark.parametrize(
    ("kind", "precision"), [("int8", "no"), ("nf4", "no"), ("fp8", "no"), ("fp8", "bf16")]
)
def test_gradients_computed_from_checkpoints_are_the_same(
    world: Path, kind: Kind, precision: Literal["no", "bf16"]
) -> None:
    keys = {"quantize": kind, "mixed_precision": precision, "rank": 2, "conv_rank": 2}
    base = Base(model=str(world / "base"), gradient_checkpointing=True, **keys)
    family = load_family(base)
    methods = attach(base, family)
    numbers = torch.Generator().manual_seed(1)
    for parameter in methods.parameters.values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=numbers)
    inner = family.denoiser.get_submodule("up_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj")
    passes: list[None] = []
    inner.register_forward_hook(lambda *given: passes.append(None))
    family.denoiser.train()
    text = family.encode_tokens([family.token_ids("a dog")] * 2)

    def gradients() -> list[Tensor]:
        loss = family.predict(LATENTS, torch.tensor([10, 900]), text).square().mean()
        return list(torch.autograd.grad(loss, list(methods.parameters.values())))

    computed_again = gradients()
    assert len(passes) == 2
    family.denoiser.disable_gradient_checkpointing()
    kept = gradients()
    assert len(passes) == 3
    assert all(torch.equal(one, other) for one, other in zip(computed_again, kept, strict=True))
    assert any(bool(gradient.any()) for gradient in kept)


def test_nothing_of_a_layer_is_kept_for_the_backward_pass() -> None:
    """A weight brought back and kept would cost more than the bits that were saved."""
    _, other = small("fp8")
    kept: list[Tensor] = []

    def seen(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(seen, lambda tensor: tensor):
        other(torch.ones(2, 6, 8, 8, requires_grad=True))
    assert not kept


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_depend_on_the_weights_alone_and_outlive_a_cast(kind: Kind) -> None:
    def stored(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        layer = nn.Linear(2048, 2048, bias=False)  # more blocks than one thread sums
        layer.weight.data = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))
        network = nn.Sequential(layer)
        quantize(network, kind, CPU)
        return list(network.to(torch.bfloat16).buffers())

    before = torch.get_num_threads()
    try:
        one, two = stored(1), stored(2)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, one, two))
    assert {tensor.dtype for tensor in one} == {torch.uint8}
    bits = 8 * sum(tensor.nbytes for tensor in one) / 2048**2
    assert bits == pytest.approx({"int8": 8.02, "nf4": 4.13, "fp8": 8.02}[kind], abs=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_the_denoiser_is_quantised_and_nothing_else(world: Path, kind: Kind) -> None:
    plain = load_family(Base(model=str(world / "base")))
    family = load_family(Base(model=str(world / "base"), quantize=kind))

    changed = quantized_layers(family.denoiser)
    linear = {n for n, m in plain.denoiser.named_modules() if isinstance(m, nn.Linear)}
    convolutions = {n for n, m in plain.denoiser.named_modules() if isinstance(m, nn.Conv2d)}
    assert set(changed) == linear | (convolutions - {"conv_in", "conv_out"} if kind == "fp8" else set())
    assert family.text_identity() == plain.text_identity()
    assert family.image_identity() == plain.image_identity()
    expected = predicted(plain)
    error = (predicted(family) - expected).norm() / expected.norm()
    assert 0 < error < ERRORS[kind]


@pytest.mark.parametrize(
    ("kind", "adapter"),
    [
        ("fp8", {"conv_rank": 2}),
        ("int8", {"use_dora": True}),
        ("nf4", {"adapter": "loha"}),
        ("nf4", {"adapter": "lokr"}),
    ],
)
def test_every_adapter_starts_as_no_change_and_trains_beside_another_run_s(
    world: Path, kind: Kind, adapter: dict[str, Any]
) -> None:
    base = Base(model=str(world / "base"), quantize=kind, rank=2, gradient_checkpointing=True, **adapter)
    family = load_family(base)
    before = predicted(family)
    first, second = attach(base, family, "first"), attach(base, family, "second")
    assert all(parameter.dtype is torch.float32 for parameter in first.parameters.values())
    for methods in (first, second):
        methods.use()
        torch.testing.assert_close(predicted(family), before, rtol=1e-5, atol=1e-6)

    first.use()
    family.denoiser.train()
    text = family.encode_tokens([family.token_ids("a dog")] * 2)
    torch.autograd.backward(family.predict(LATENTS, torch.tensor([10, 900]), text).square().mean())
    for parameter in first.parameters.values():
        assert parameter.grad is not None
        parameter.data -= 0.1 * parameter.grad.sign()
    family.denoiser.eval()
    assert (predicted(family) - before).abs().max() > 1e-3
    second.use()
    torch.testing.assert_close(predicted(family), before, rtol=1e-5, atol=1e-6)
    with first.aside():
        assert torch.equal(predicted(family), before)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("nf4", {"mixed_precision": "bf16", "train_text_encoder": True}),
        ("fp8", {"mixed_precision": "bf16", "gradient_checkpointing": True, "channels_last": True}),
    ],
)
def test_a_stopped_run_on_it_ends_in_the_same_bytes_and_is_exported_for_the_plain_base(
    world: Path, lay: Lay, tmp_path: Path, kind: Kind, more: dict[str, Any]
) -> None:
    start = adapted_checkpoint(tiny_spec(world / "base", world / "images"), tmp_path / "start") / ADAPTER
    spec = tiny_spec(
        world / "base",
        world / "images",
        base={
            "quantize": kind,
            "max_train_steps": 2,
            "gradient_accumulation_steps": 1,
            "merged_adapters": [{"path": str(start)}],
            **more,
        },
        validation={"every": 0, "timesteps": 1},
    )
    straight, _, second = interrupted(lay, spec, 1)
    assert contents(newest(second)) == contents(newest(straight))

    trained = trained_adapter(newest(second), spec)
    assert verify_export(write_weights(trained, tmp_path / "out", "kohya"), trained)["modules"] > 0


def test_a_rank_above_a_layers_true_size_is_refused(world: Path) -> None:
    """Four bits to a number are packed: their tensor has another shape than the weight."""
    base = Base(model=str(world / "base"), quantize="nf4", rank=9)
    with pytest.raises(BadInput, match=r"rank: unet of .* 9 is above the size of .*to_q, 8"):
        attach(base, load_family(base))


def test_without_bitsandbytes_four_bits_are_refused_by_name(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(BadInput, match=r"base\.quantize nf4 needs bitsandbytes") as refused:
        load_family(Base(model=str(world / "base"), quantize="nf4"))
    assert "int8" in refused.value.hint
    load_family(Base(model=str(world / "base"), quantize="int8"))


def test_a_transformer_of_stable_diffusion_3_is_quantised_too(tmp_path: Path) -> None:
    base = Base(model=str(build_base(tmp_path / "sd3", "sd3-without-t5")), quantize="nf4")
    family = load_family(base)
    assert quantized_layers(family.denoiser)
    attach(base, family)
