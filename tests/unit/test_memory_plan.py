"""What a run will need of memory is told before: the same bytes as tensors that are really there."""

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from support.tiny_world import build_base, tiny_spec
from torch import Tensor

from orchestrator.cli import main
from trainer.config import Base, RunSpec
from trainer.errors import BadInput
from trainer.families import load_family
from trainer.memory.estimate import estimate, size_of
from trainer.memory.hollow_cuts import cuts_until
from trainer.memory.live_bytes import LiveBytes
from trainer.memory.plan import MemoryPlan, Need, Phase
from trainer.methods import attach
from trainer.optim import build_optimizer

TOLERANCE = 0.02
"""Of the activations: beside what autograd keeps there is the prediction itself."""


def needs(phase: Phase) -> dict[str, int]:
    return {need.what: need.size for need in phase.needs}


def spec_of(world: Path, base: dict[str, Any], **blocks: Any) -> RunSpec:
    return tiny_spec(world / "base", world / "images", base=base, **blocks)


def tensors(network: torch.nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()


class Kept:
    """What autograd holds instead of a tensor that it keeps, as long as it keeps it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_bytes(family: Any, spec: RunSpec) -> int:
    """What autograd keeps of one real pass forward, weights not counted."""
    own = {tensor.untyped_storage().data_ptr() for tensor in tensors(family.denoiser)}
    kept: weakref.WeakSet[Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Kept:
        kept.add(holder := Kept(tensor))
        return holder

    batch, side = spec.base.train_batch_size, spec.base.resolution // family.latent_pixels
    with torch.no_grad():
        told = family.encode_tokens([family.token_ids("")] * batch)
    noisy = torch.zeros(batch, family.latent_channels, side, side)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        loss = family.predict(noisy, torch.ones(batch, dtype=torch.long), told).square().mean()
    storages = {one.tensor.untyped_storage().data_ptr(): one.tensor.untyped_storage() for one in kept}
    total = sum(storage.nbytes() for where, storage in storages.items() if where not in own)
    torch.autograd.backward(loss)
    return total


@pytest.mark.parametrize(
    "base",
    [
        {"use_dora": True, "targets": "linear", "conv_rank": 2},
        {
            "quantize": "nf4",
            "mixed_precision": "bf16",
            "gradient_checkpointing": True,
            "optimizer": "adamw8bit",
            "adam8bit_min_size": 64,
            "ema_decay": 0.9,
        },
    ],
    ids=["dora-conv", "nf4-8bit-checkpointing"],
)
def test_the_plan_names_the_bytes_of_a_real_step(world: Path, base: dict[str, Any]) -> None:
    spec = spec_of(world, base)
    planned = needs(estimate(spec, on_cuda=False).phase("training"))

    family: Any = load_family(spec.base)
    weights = size_of(tensors(family.denoiser))
    methods = attach(spec.base, family)
    optimizer = build_optimizer(spec.base, methods.groups())
    family.denoiser.train()
    kept = kept_bytes(family, spec)
    optimizer.step()
    parameters = list(methods.parameters.values())
    states = [t for p in parameters for t in optimizer.state[p].values() if isinstance(t, Tensor)]
    assert planned["denoiser"] == weights
    assert planned["trained parameters"] == size_of(parameters)
    assert planned["gradients"] == size_of(p.grad for p in parameters if p.grad is not None)
    assert planned["optimizer"] == size_of(states)
    assert planned["moving average"] == (size_of(parameters) if spec.base.ema_decay else 0)
    assert planned["activations"] == pytest.approx(kept, rel=TOLERANCE)


def test_a_plan_of_all_of_the_base_counts_its_weights_once_and_needs_none(
    world: Path, tmp_path: Path
) -> None:
    build_base(tmp_path / "base")
    for weights in (tmp_path / "base").rglob("*.safetensors"):
        weights.unlink()
    base = {"model": str(tmp_path / "base"), "train": ["full"], "resolution": 32}
    samples = {"prompts": ["a dog"], "every": 1}
    spec = RunSpec.model_validate({"base": base, "dataset": {"path": "images"}, "samples": samples})
    plan = estimate(spec)
    training, sampling = (needs(plan.phase(name)) for name in ("training", "sampling"))
    unet = size_of(tensors(load_family(Base(model=str(world / "base"))).denoiser))
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


def test_a_cut_is_found_by_a_limit_of_memory(world: Path) -> None:
    first = estimate(spec_of(world, {"resolution": 32, "hollow": 0})).phase("training")
    told = list(cuts_until(spec_of(world, {"resolution": 32}), first.size))
    assert [line.partition(":")[0] for line in told[:3]] == ["whole UNet", "base.hollow 0", "base.hollow 1"]
    assert told[3:] == ["write into base: hollow: 1"]
    with pytest.raises(BadInput, match="train full would change it"):
        list(
            cuts_until(
                RunSpec.model_validate({"base": {"model": "", "train": ["full"]}, "dataset": {"path": ""}}), 1
            )
        )


def test_the_command_tells_of_each_kind_of_run_of_a_sweep() -> None:
    """Runs that differ in seed or rate only are one kind; the ranks of the example are two."""
    grid = Path(__file__).parents[2] / "examples" / "digits" / "grid.yaml"
    told = CliRunner().invoke(main, ["plan", str(grid), "--hollow-below", "1"])
    assert told.exit_code == 0, told.output
    whole = [line for line in told.output.splitlines() if line.startswith("whole UNet: training needs 0.0")]
    assert len(whole) == told.output.count("base.hollow is not needed") == 2


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
    spec = spec_of(world, {"resolution": 512, "train_batch_size": 8, **base})
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
