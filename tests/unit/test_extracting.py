"""What is extracted of a planted change: as many singular values as were asked for, and the rest is told."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.__main__ import main as trainer
from trainer.errors import BadInput
from trainer.weights.combining import Ranks
from trainer.weights.extracting import extract
from trainer.weights.lora_file import LoraFile, read_lora

LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONVOLUTION = "mid_block.resnets.0.conv1"
PLANTED = {LINEAR: (1.0, 0.5, 0.2, 0.01), CONVOLUTION: (1.0, 0.6, 0.3, 0.01)}
"""Singular values of what is added to two weights."""
NO_LORA_HOLDS = ("unet.conv_norm_out.weight", "unet.mid_block.resnets.0.conv1.bias")


def change(like: Tensor, values: tuple[float, ...]) -> Tensor:
    """A change of a weight with these singular values."""
    flat_OI = torch.randn(like.flatten(1).shape, generator=torch.Generator().manual_seed(1))
    u_OR, _, v_RI = torch.linalg.svd(flat_OI, full_matrices=False)
    count = len(values)
    return (u_OR[:, :count] * torch.tensor(values) @ v_RI[:count]).reshape(like.shape)


@pytest.fixture(scope="module")
def tuned(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned") / "model"
    shutil.copytree(built / "base", folder)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    for name, values in PLANTED.items():
        weights[f"{name}.weight"] += change(weights[f"{name}.weight"], values)
    for name in NO_LORA_HOLDS:
        weights[name.removeprefix("unet.")] += 0.5
    save_file(weights, file, {"format": "pt"})
    return folder


def ranks_of(lora: LoraFile) -> dict[str, int]:
    return {module.name: module.rank for module in lora.modules}


@pytest.mark.parametrize(
    ("ranks", "linear", "convolution"),
    [(Ranks(threshold=0.4), 2, 2), (Ranks(ratio=0.55), 1, 2), (Ranks(frobenius=0.9), 2, 2)],
    ids=["threshold", "ratio", "frobenius"],
)
def test_every_rule_holds_for_convolutions_with_a_rank_of_their_own(
    built: Path, tuned: Path, ranks: Ranks, linear: int, convolution: int
) -> None:
    found = extract(str(built / "base"), str(tuned), ranks, conv_rank=3)
    assert ranks_of(found.lora) == {LINEAR: linear, CONVOLUTION: convolution}
    missed = []
    for module in found.lora.modules:
        values = torch.tensor(PLANTED[module.name])
        missed.append(float(values[module.rank :].norm() / values.norm()))
        planted = change(module.tensors["lora_A.weight"].new_zeros(_shape(module.tensors)), tuple(values))
        apart = module.change_OI() - planted.flatten(1)
        assert apart.norm() == pytest.approx(float(values[module.rank :].norm()), rel=1e-3)
    assert found.error == pytest.approx(max(missed), rel=1e-3)


def _shape(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    return (len(tensors["lora_B.weight"]), *tensors["lora_A.weight"].shape[1:])


def test_the_command_says_what_no_lora_holds_and_which_rank_it_needs(
    built: Path, tuned: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.safetensors"
    words = ["lora", "extract", str(tuned), "--base", str(built / "base"), "--out", str(out)]
    refused = CliRunner().invoke(trainer, [*words, "--conv-rank", "1"])
    assert refused.exit_code == 78
    assert "which rank of linear layers? --conv-rank is of kernels larger than 1" in refused.output
    assert "give --rank, --threshold or --ratio" in refused.output
    with pytest.raises(BadInput, match="which rank to extract"):
        extract(str(built / "base"), str(tuned), Ranks())
    said = CliRunner().invoke(
        trainer, [*words, "--rank", "2", "--threshold", "0.1", "--conv-rank", "1"], catch_exceptions=False
    )
    assert said.exit_code == 0, said.output
    assert "2 modules, rank 1 to 2; " in said.output
    assert f"also changed, and in no LoRA: 2 parameters, such as {NO_LORA_HOLDS[0]}" in said.output
    assert ranks_of(read_lora(out)) == {LINEAR: 2, CONVOLUTION: 1}
