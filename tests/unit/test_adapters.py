"""Each kind of adapter begins as no change at all, trains in fp32, and goes on after a stop as if nothing had
been."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import build_base
from support.tiny_world import tiny_spec
from support.training import Lay, contents, newest

from trainer.attempt import run_attempt
from trainer.config import Base
from trainer.errors import BadInput
from trainer.families import Family, load_family
from trainer.methods import Methods, attach
from trainer.methods.configs import read_configs
from trainer.rundir import EXIT_COMPLETE
from trainer.stop import Stop
from trainer.validate import evaluating

KINDS: dict[str, dict[str, Any]] = {
    "linear-rslora": {"targets": "linear", "use_rslora": True},
    "locon": {"targets": "linear", "conv_rank": 2, "conv_alpha": 1.0},
    "dora": {"use_dora": True, "conv_rank": 2},
    "loha": {"adapter": "loha", "targets": "linear", "conv_rank": 2},
    "lokr": {"adapter": "lokr", "targets": "linear", "conv_rank": 1, "rank": 2, "lokr_factor": 4},
    "texts": {"train_text_encoder": True, "text_encoder_learning_rate": 1e-4, "lora_dropout": 0.1},
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("xl"), "sdxl")


def base_of(world: Path, **keys: Any) -> Base:
    return Base(model=str(world / "base"), **{"rank": 4, "alpha": 2.0, **keys})


def predicted(family: Family, *texts: str) -> torch.Tensor:
    noise = torch.Generator().manual_seed(1)
    noisy = torch.randn((len(texts), 4, 8, 8), generator=noise)
    conditioning = family.encode_tokens([family.token_ids(text) for text in texts])
    return family.predict(noisy, torch.full((len(texts),), 500), conditioning)


def step(methods: Methods, family: Family, optimizer: torch.optim.Optimizer) -> float:
    """Go towards a prediction of zeros; return the loss before."""
    methods.use()
    loss = predicted(family, "a dog", "a cat").pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def optimizer_of(methods: Methods) -> torch.optim.Optimizer:
    return torch.optim.Adam(methods.parameters.values(), lr=0.01)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@each_kind
def test_an_adapter_begins_as_no_change_and_trains_in_fp32(world: Path, kind: str, precision: str) -> None:
    base = base_of(world, mixed_precision=precision, **KINDS[kind])
    family = load_family(base)
    with torch.no_grad():
        before = predicted(family, "a dog", "a cat")
    methods = attach(base, family)
    methods.use()
    with torch.no_grad():
        assert torch.equal(predicted(family, "a dog", "a cat"), before)
    assert {parameter.dtype for parameter in methods.parameters.values()} == {torch.float32}
    optimizer = optimizer_of(methods)
    losses = [step(methods, family, optimizer) for _ in range(3)]
    assert losses[-1] < losses[0]
    with methods.aside(), torch.no_grad():
        assert torch.equal(predicted(family, "a dog", "a cat"), before)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"texts"}))
def test_without_dropout_no_chance_decides_what_is_computed(world: Path, kind: str) -> None:
    base = base_of(world, **KINDS[kind])
    family = load_family(base)
    attach(base, family).use()
    family.denoiser.train()
    before = torch.get_rng_state()
    predicted(family, "a dog")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", [*KINDS, "xl"][1:])
def test_an_interrupted_run_ends_in_the_same_bytes(world: Path, xl: Path, lay: Lay, kind: str) -> None:
    keys = {"max_train_steps": 3, "lora_dropout": 0.0, **KINDS.get(kind, KINDS["texts"])}
    base = xl if kind == "xl" else world / "base"
    spec = tiny_spec(base, world / "images", base=keys, dataset={"val_fraction": 0.0})
    straight = lay("straight", spec, every_steps=2)
    assert run_attempt(straight, Stop()) == EXIT_COMPLETE
    halfway = straight.checkpoints / "step-000000002"
    again = lay("again", spec, resume=halfway)
    assert run_attempt(again, Stop()) == EXIT_COMPLETE
    assert contents(newest(again)) == contents(newest(straight))
    assert contents(newest(again))["adapter.safetensors"] != contents(halfway)["adapter.safetensors"]


def test_what_an_adapter_begins_with_is_decided_by_the_seed(world: Path) -> None:
    def begun(seed: int) -> dict[str, torch.Tensor]:
        base = base_of(world, seed=seed, use_dora=True, train_text_encoder=True)
        return {name: p.detach() for name, p in attach(base, load_family(base)).parameters.items()}

    one, same, other = begun(1), begun(1), begun(2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    drawn = [name for name in one if "lora_A" in name]
    assert not any(torch.equal(one[name], other[name]) for name in drawn)


def test_the_header_tells_of_each_network(world: Path) -> None:
    base = base_of(world, **KINDS["locon"], train_text_encoder=True)
    methods = attach(base, load_family(base))
    configs = read_configs(methods.metadata())
    assert configs["unet"]["rank_pattern"] == {
        "conv1": 2,
        "conv2": 2,
        "downsamplers.0.conv": 2,
        "upsamplers.0.conv": 2,
    }
    assert configs["text_encoder"]["target_modules"] == sorted(
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    )
    shapes = {name: list(p.shape) for name, p in methods.parameters.items()}
    resnet = "unet.mid_block.resnets.0"
    assert shapes[f"{resnet}.conv1.lora_A.weight"] == [2, 32, 3, 3]
    assert shapes[f"{resnet}.time_emb_proj.lora_A.weight"][0] == 4, "linear layers have the rank"


def test_dropout_of_a_text_encoder_comes_back_after_an_evaluation(world: Path) -> None:
    base = base_of(world, train_text_encoder=True, lora_dropout=0.5)
    family = load_family(base)
    attach(base, family)
    encoder = family.text_encoders["text_encoder"]
    dropouts = [module for module in encoder.modules() if isinstance(module, torch.nn.Dropout)]
    with evaluating(family):
        assert not any(module.training for module in dropouts)
    assert all(module.training for module in dropouts)
    assert not encoder.training


def test_the_text_encoders_have_their_own_learning_rate(world: Path) -> None:
    base = base_of(world, train_text_encoder=True, learning_rate=1e-3, text_encoder_learning_rate=1e-4)
    rates = [rate for _, rate in attach(base, load_family(base)).groups()]
    assert rates == pytest.approx([1.0, 0.1])


def test_runs_that_share_a_base_take_turns(world: Path) -> None:
    bases = [
        base_of(world, seed=1, use_dora=True, train_text_encoder=True),
        base_of(world, seed=2, targets="linear"),
    ]

    def alone(base: Base) -> list[torch.Tensor]:
        family = load_family(base)
        methods = attach(base, family)
        optimizer = optimizer_of(methods)
        for _ in range(2):
            step(methods, family, optimizer)
        return [parameter.detach() for parameter in methods.parameters.values()]

    shared = load_family(bases[0])
    both = [attach(base, shared, f"run{n}") for n, base in enumerate(bases)]
    optimizers = [optimizer_of(methods) for methods in both]
    for _ in range(2):
        for methods, optimizer in zip(both, optimizers, strict=True):
            step(methods, shared, optimizer)
    for methods, base in zip(both, bases, strict=True):
        parameters = zip(methods.parameters.values(), alone(base), strict=True)
        assert all(torch.equal(got, expected) for got, expected in parameters)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rank": 9}, r"base.rank: unet.*: 9 is above the size of .*, 8"),
        ({"conv_rank": 16}, r"base.conv_rank: .*: 16 is above the size of .*conv\d, 8"),
        ({"targets": ("to_x",)}, "fit no module"),
    ],
)
def test_an_adapter_that_does_not_fit_the_model_is_refused(
    world: Path, keys: dict[str, Any], message: str
) -> None:
    base = base_of(world, **keys)
    with pytest.raises(BadInput, match=message):
        attach(base, load_family(base))
