"""What a run will need of memory is told before: the same bytes as tensors that are really there."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from diffusers import UNet2DConditionModel
from support.tiny_control import build_control
from support.tiny_world import build_base, tiny_spec
from support.training import Lay
from torch import Tensor

from orchestrator.cli import main
from orchestrator.commands.planning import kind_of
from trainer.__main__ import main as trainer_main
from trainer.attempt import prepare
from trainer.config import Base, RunSpec
from trainer.errors import BadInput
from trainer.families import load_family
from trainer.memory.estimate import estimate, size_of
from trainer.memory.hollow_cuts import cuts_until
from trainer.memory.live_bytes import LiveBytes
from trainer.memory.numberless import all_tensors, tensors
from trainer.memory.plan import GB, TRAINING, MemoryPlan, Need, Phase
from trainer.methods import attach
from trainer.parts import Parts
from trainer.step import in_training, summed_loss
from trainer.stop import Stop

TOLERANCE = 0.001
"""Of the activations: a data set's captions are not all alike, and nor are the numbers that Python makes of
them."""
WORDS = {
    "train": ["textual_inversion"],
    "tokens": [{"token": "<sks>", "words": "dog dog"}, {"token": "<b>", "init": "noise"}],
}
PIVOTAL = WORDS | {"train": ["textual_inversion", "adapter"], "tokens_until": 0.5, "adapter_from": 0.5}
OF_AN_ADAPTER = {"rank": 8, "alpha": None, "lora_dropout": 0.0}
"""Its defaults, where ``tiny_spec`` says something else."""


@pytest.fixture(scope="module")
def shallow(world: Path) -> Path:
    """The world, whose models ``sd1`` and ``sdxl`` have UNets of two levels, with a ControlNet of each; the
    captions contain words to be taught. An operation without numbers takes as long as one with a few."""
    shutil.copytree(world / "base", world / "sd1")
    build_base(world / "sdxl", "sdxl")
    levels = {
        "sd1": ("CrossAttnDownBlock2D", "DownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
        "sdxl": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    }
    for name, (*down, up, last) in levels.items():
        config = json.loads((world / name / "unet" / "config.json").read_text())
        config |= {"down_block_types": down, "up_block_types": [up, last], "layers_per_block": 1}
        config |= {"block_out_channels": [8, 16], "transformer_layers_per_block": 1}
        config["attention_head_dim"] = 4
        torch.manual_seed(1)
        UNet2DConditionModel.from_config(config).save_pretrained(world / name / "unet")
        build_control(world / name, world / f"{name}-control")
    lines = world / "images" / "metadata.jsonl"
    lines.write_text(lines.read_text().replace("a dog", "<sks>, <b>"))
    return world


def needs(phase: Phase) -> dict[str, int]:
    return {need.what: need.size for need in phase.needs}


def spec_of(world: Path, model: str, base: dict[str, Any], **blocks: Any) -> RunSpec:
    without = OF_AN_ADAPTER if "adapter" not in base.get("train", ["adapter"]) else {}
    return tiny_spec(world / model, world / "images", base={**without, **base}, **blocks)


def measured(parts: Parts, step: int) -> dict[str, int]:
    """What a real step has in memory, by what the plan calls it. The step is taken."""
    family: Any = parts.family
    methods, parameters = parts.methods, list(parts.methods.parameters.values())
    trained = methods.at(step)
    methods.use()
    for parameter in trained:  # of the pass before
        parameter.grad = torch.zeros_like(parameter)
    networks = {
        "denoiser": [family.denoiser],
        "text encoders": list(family.text_encoders.values()),
        "ControlNet": [family._control] if parts.spec.base.control else [],
    }
    there = {name: [t for each in group for t in tensors(each)] for name, group in networks.items()}
    batch = parts.training.batches(step, parts.spec.base.train_batch_size)[0]
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    with LiveBytes([*all_tensors(family), *parameters, *gradients]) as live:
        loss = summed_loss(
            *(batch,),
            family=family,
            methods=methods,
            objective=parts.objective,
            texts=parts.texts,
            beside=parts.beside,
        )
        kept = live.now
        torch.autograd.backward(loss)
    parts.optimizer.step()
    parts.optimizer.zero_grad(set_to_none=True)
    states = [t for p in parameters for t in parts.optimizer.state[p].values() if isinstance(t, Tensor)]
    own = {id(parameter) for parameter in parameters}
    sizes = {name: size_of(t for t in group if id(t) not in own) for name, group in there.items()}
    return {name: size for name, size in sizes.items() if size} | {
        "trained parameters": size_of(parameters),
        "gradients": size_of(gradients),
        "optimizer": size_of(states),
        "moving average": size_of(parts.average.tensors.values()) if parts.average else 0,
        "activations": kept,
        "work": live.most - kept,
    }


@pytest.mark.parametrize(
    ("model", "base", "steps"),
    [
        ("sd1", {"use_dora": True, "targets": "linear", "conv_rank": 2}, [0]),
        (
            "sd1",
            {
                "quantize": "nf4",
                "mixed_precision": "bf16",
                "gradient_checkpointing": True,
                "optimizer": "adamw8bit",
                "adam8bit_min_size": 64,
                "ema_decay": 0.9,
            },
            [0],
        ),
        ("sd1", {"adapter": "loha", "lora_dropout": 0.0, "targets": "linear", "conv_rank": 2}, [0]),
        ("sd1", {"adapter": "lokr", "lora_dropout": 0.0, "gradient_checkpointing": True}, [0]),
        ("sdxl", {"control": "sdxl-control", "mixed_precision": "bf16"}, [0]),
        ("sd1", PIVOTAL | {"control": "sd1-control", "token_norm": "decay"}, [0, 3]),
        ("sdxl", WORDS | {"gradient_checkpointing": True}, [0]),
    ],
    ids=[
        "dora-conv",
        "nf4-8bit-checkpointing",
        "loha",
        "lokr",
        "control",
        "words, then an adapter",
        "words-checkpointing",
    ],
)
def test_the_plan_names_the_bytes_of_a_real_step(
    shallow: Path, lay: Lay, model: str, base: dict[str, Any], steps: list[int]
) -> None:
    """Words make a run encode captions in each step. What rests has no gradient, and no state until it
    begins."""
    dataset = {}
    if control := base.get("control"):
        base, dataset = base | {"control": {"model": str(shallow / control)}}, {"control": "edges"}
    spec = spec_of(shallow, model, base, dataset=dataset)
    plan = estimate(spec, on_cuda=False)

    parts = prepare(lay("run", spec), Stop())
    in_training(parts.family, parts.methods)
    phases = [phase for phase in plan.phases if phase.name.startswith(TRAINING)]
    for phase, step in zip(phases, steps, strict=True):
        found, planned = measured(parts, step), needs(phase)
        for name in ("activations", "work"):
            assert planned.pop(name) == pytest.approx(found.pop(name), rel=TOLERANCE), name
        assert planned == found


def test_a_plan_of_all_of_the_base_counts_its_weights_once_and_needs_none(
    shallow: Path, tmp_path: Path
) -> None:
    shutil.copytree(shallow / "sd1", tmp_path / "base")
    for weights in (tmp_path / "base").rglob("*.safetensors"):
        weights.unlink()
    base = {"model": str(tmp_path / "base"), "train": ["full"], "resolution": 32}
    samples = {"prompts": ["a dog"], "every": 1}
    spec = RunSpec.model_validate({"base": base, "dataset": {"path": "images"}, "samples": samples})
    plan = estimate(spec)
    training, sampling = (needs(plan.phase(name)) for name in ("training", "sampling"))
    unet = size_of(tensors(load_family(Base(model=str(shallow / "sd1"))).denoiser))
    assert (training["denoiser"], training["trained parameters"]) == (0, unet)
    assert [phase.name for phase in plan.phases] == [
        "encoding captions",
        "encoding images",
        "training",
        "sampling",
    ]
    assert sampling["VAE"] == needs(plan.phase("encoding images"))["VAE"] > 0
    assert sampling["work"] > 0
    assert "quantize" not in plan.advice


def test_a_cut_is_found_by_a_limit_of_memory(shallow: Path, tmp_path: Path) -> None:
    first = estimate(spec_of(shallow, "sd1", {"hollow": 0})).phase("training")
    spec = spec_of(shallow, "sd1", {})
    file = tmp_path / "spec.json"
    file.write_text(spec.model_dump_json())
    said = CliRunner().invoke(
        trainer_main, ["plan", "--spec", str(file), "--hollow-below", str(first.size / GB)]
    )
    told = said.output.splitlines()
    assert [line.partition(":")[0] for line in told[-4:-1]] == [
        "whole UNet",
        "base.hollow 0",
        "base.hollow 1",
    ]
    assert told[-1] == "write into base: hollow: 1"
    assert list(cuts_until(spec, GB))[-1] == "base.hollow is not needed"
    with pytest.raises(BadInput, match="train full would change it"):
        list(
            cuts_until(
                RunSpec.model_validate({"base": {"model": "", "train": ["full"]}, "dataset": {"path": ""}}), 1
            )
        )


def test_the_command_tells_of_each_kind_of_run_of_a_sweep(shallow: Path) -> None:
    keys = {**PIVOTAL, "token_norm": "decay", "max_train_steps": 4, "resolution": 32}
    grid = {
        "parameters": {"learning_rate": {"values": [1e-4, 1e-3]}},
        "base": {"model": "sd1", "control": {"model": "sd1-control"}, **keys},
        "dataset": {"path": "images", "control": "edges"},
    }
    file = shallow / "grid.yaml"
    file.write_text(json.dumps(grid))
    told = CliRunner().invoke(main, ["plan", str(file)])
    assert told.exit_code == 0, told.output
    for each in ("and 1 more like it", "training textual_inversion: ", "training adapter: "):
        assert told.output.count(each) == 1, told.output
    assert "  ControlNet " in told.output


def test_runs_that_differ_in_seed_or_rate_only_are_of_one_kind() -> None:
    prior = {"prompt": "a dog", "images": 2}
    first, second, third, fourth = (
        kind_of(tiny_spec(Path("m"), Path("d"), base=base, prior=given))
        for base, given in (
            ({}, None),
            ({"seed": 5, "learning_rate": 1e-5}, None),
            ({"rank": 8}, None),
            ({}, prior),
        )
    )
    assert first == second
    assert len({first, third, fourth}) == 3


def test_what_is_not_described_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such folder"):
        estimate(tiny_spec(tmp_path / "absent", tmp_path))
    (tmp_path / "base").mkdir()
    with pytest.raises(BadInput, match="not described in full"):
        estimate(tiny_spec(tmp_path / "base", tmp_path))


def test_bytes_count_while_their_tensor_lives() -> None:
    known = torch.zeros(100)
    with LiveBytes([known]) as live:
        kept = known + 1
        view = kept[:50]
        del kept
        torch.zeros(1000).sum()
        known.add_(1)
        assert (live.now, live.most) == (400, 400 + 4000 + 4)
        del view
        assert live.now == 0


def test_the_table_names_the_phase_that_needs_most_and_all_runs_of_a_gpu() -> None:
    small = Phase("sampling", (Need("denoiser", 10**9, "weights"), Need("VAE", 0)))
    large = Phase("training", (Need("denoiser", 10**9, "weights"), Need("optimizer", 5 * 10**8, "adamw")))
    assert MemoryPlan((large, small), "less").lines(2) == [
        "training: 1.50 GB (most)",
        "  denoiser       1.000 GB  weights",
        "  optimizer      0.500 GB  adamw",
        "sampling: 1.00 GB",
        "  denoiser       1.000 GB  weights",
        "at most 1.50 GB; 2 runs share a GPU: 3.00 GB",
        "besides: CUDA's own context, half a GB or so, and what the allocator rounds up",
        "less",
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("base", [{}, {"mixed_precision": "bf16", "quantize": "fp8"}])
def test_a_gpu_allocates_what_was_planned(world: Path, base: dict[str, Any]) -> None:
    """Images so large that what an allocator rounds up does not count."""
    spec = spec_of(world, "base", {"resolution": 512, "train_batch_size": 8, **base})
    planned = needs(estimate(spec).phase("training"))
    family: Any = load_family(spec.base)
    methods = attach(spec.base, family)
    side = 512 // family.latent_pixels
    told = family.encode_tokens([family.token_ids("")] * 8)
    family.denoiser.train()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    noisy = torch.zeros(8, family.latent_channels, side, side, device="cuda")
    methods.use()
    loss = family.predict(noisy, torch.ones(8, dtype=torch.long, device="cuda"), told).square().mean()
    torch.autograd.backward(loss)
    measured = torch.cuda.max_memory_allocated() - before
    assert planned["activations"] + planned["work"] == pytest.approx(measured, rel=0.2)
