"""A hypernetwork begins as no change at all, trains nothing but itself, and goes on after a stop as if
nothing had been."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from support.adapters import adapted_checkpoint
from support.tiny_models import build_base
from support.tiny_world import tiny_spec
from support.training import Lay, StopAtStep, contents, interrupted, newest

from orchestrator.launching.adapters import adapter_problems
from trainer.config import Base, RunSpec
from trainer.errors import BadInput
from trainer.export.checkpoint import Wanted, export_checkpoint
from trainer.families import Family, load_family
from trainer.generate import Wish, generate
from trainer.methods import Methods, attach
from trainer.methods.hypernetwork import Hypernetwork
from trainer.methods.hypernetwork_files import a1111_bytes, put_onto, read_hypernetwork
from trainer.sample import trained_on_base
from trainer.validate import evaluating

# Of diffusers' sampler, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

RICH = {"hypernetwork_activation": "swish", "hypernetwork_layer_norm": True, "hypernetwork_dropout": 0.2}


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("xl"), "sdxl")


@pytest.fixture
def base(world: Path) -> Base:
    return Base(model=str(world / "base"), train="hypernetwork")


def predicted(family: Family) -> torch.Tensor:
    noisy = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    said = family.encode_tokens([family.token_ids("a dog")])
    sizes = family.size_conditioning(torch.tensor([[64.0, 64, 0, 0, 64, 64]]))
    return family.predict(noisy, torch.tensor([500]), {**said, **sizes})


def moved(methods: Methods, family: Family, steps: int = 2) -> None:
    """Let all parameters go towards a prediction of zeros."""
    optimizer = torch.optim.Adam(methods.parameters.values(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        predicted(family).pow(2).mean().backward()
        optimizer.step()


def watched(module: torch.nn.Module) -> list[torch.Tensor]:
    """What the module is given from now on."""
    seen: list[torch.Tensor] = []
    module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    return seen


@pytest.mark.parametrize(
    ("kind", "keys"), [("sd1", {}), ("sd1", {**RICH, "mixed_precision": "bf16"}), ("sdxl", RICH)]
)
def test_a_fresh_one_changes_nothing_and_a_trained_one_does(
    world: Path, xl: Path, kind: str, keys: dict[str, Any]
) -> None:
    base = Base(model=str(xl if kind == "sdxl" else world / "base"), train="hypernetwork", **keys)
    family = load_family(base)
    with torch.no_grad():
        bare = predicted(family)
    weights = {name: tensor.clone() for name, tensor in family.denoiser.state_dict().items()}
    methods = attach(base, family)
    with torch.no_grad():
        assert torch.equal(predicted(family), bare)
    widths = {name.split(".")[1] for name in methods.parameters}
    levels = {"sd1": (8, 16, 32), "sdxl": (16, 32, 80)}[kind]
    assert widths == {f"{width}_{part}" for width in levels for part in "kv"}
    assert {parameter.dtype for parameter in methods.parameters.values()} == {torch.float32}
    before = {name: parameter.detach().clone() for name, parameter in methods.parameters.items()}

    moved(methods, family)

    assert not any(torch.equal(before[name], methods.parameters[name]) for name in before)
    after = family.denoiser.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())
    with evaluating(family):
        assert not torch.equal(predicted(family), bare)
        with methods.aside():
            assert torch.equal(predicted(family), bare)


def test_it_stands_before_an_adapter_too_in_whatever_order_the_two_are_named(world: Path) -> None:
    seen = []
    for train in (("hypernetwork", "adapter"), ("adapter", "hypernetwork")):
        base = Base(model=str(world / "base"), train=train, rank=2)
        family = load_family(base)
        methods = attach(base, family)
        moved(methods, family)
        layer = family.denoiser.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2.to_k")
        below, beside = watched(layer.base_layer), watched(layer.lora_A["default"])
        with torch.no_grad():
            seen.append(predicted(family))
        assert torch.equal(below[0], beside[0]), "the two see the same context"
        assert not torch.equal(below[0], family.encode_tokens([family.token_ids("a dog")])["states"])

    assert torch.equal(seen[0], seen[1])


def test_without_self_attention_only_what_reads_the_text_is_changed(base: Base) -> None:
    methods = attach(base.model_copy(update={"hypernetwork_self_attention": False}), load_family(base))
    assert {name.split(".")[1] for name in methods.parameters} == {"32_k", "32_v"}


def test_runs_that_share_a_base_do_not_see_each_other_s(base: Base) -> None:
    family = load_family(base)
    with torch.no_grad():
        bare = predicted(family)
    one = attach(base, family, "one")
    moved(one, family)
    two = attach(Base(model=base.model, rank=2), family, "two")
    three = attach(base, family, "three")
    for fresh in (two, three):
        fresh.use()
        with torch.no_grad():
            assert torch.equal(predicted(family), bare)
    one.use()
    with torch.no_grad():
        assert not torch.equal(predicted(family), bare)
    assert all(parameter.requires_grad for parameter in one.parameters.values())


def test_stopped_equals_never_stopped(world: Path, lay: Lay) -> None:
    """Beside an adapter, with dropout in both, activations computed again, and averages."""
    keys = {
        "train": ["adapter", "hypernetwork"],
        "max_train_steps": 2,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": True,
        "ema_decay": 0.9,
        **RICH,
    }
    spec = tiny_spec(world / "base", world / "images", base=keys)
    straight, first, again = interrupted(lay, spec, 1)

    assert contents(newest(again)) == contents(newest(straight))
    assert contents(newest(again))["adapter.safetensors"] != contents(newest(first))["adapter.safetensors"]


@pytest.fixture(scope="module")
def spec(world: Path) -> RunSpec:
    return tiny_spec(
        world / "base",
        world / "images",
        base={"train": "hypernetwork", **RICH},
        dataset={"trigger": "rufus"},
        samples={"prompts": ["a [trigger]"], "steps": 2},
    )


@pytest.fixture(scope="module")
def checkpoint(spec: RunSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapted_checkpoint(spec, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def exported(spec: RunSpec, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Our own file and A1111's, both verified."""
    folder = tmp_path_factory.mktemp("exported") / "cat"
    theirs, ours = export_checkpoint(checkpoint, spec, folder, Wanted(to="dir", name="cat"))
    card = (folder / "README.md").read_text()
    assert "A hypernetwork, layers 1, 2, 1, swish, for base" in card
    assert "orchestrate generate cat-hypernetwork.safetensors" in card
    return ours.path, theirs.path


def as_a1111_builds_it(width: int, said: dict[Any, Any], part: int) -> torch.nn.Module:
    """One network of a file, by the rules of A1111's HypernetworkModule."""
    structure = said["layer_structure"]
    layers: list[torch.nn.Module] = []
    for place in range(len(structure) - 1):
        layers.append(torch.nn.Linear(int(width * structure[place]), int(width * structure[place + 1])))
        if said["activation_func"] != "linear" and place < len(structure) - 2:
            layers.append({"swish": torch.nn.Hardswish}[said["activation_func"]]())
        if said["is_layer_norm"]:
            layers.append(torch.nn.LayerNorm(int(width * structure[place + 1])))
        if said["dropout_structure"][place + 1] > 0:
            layers.append(torch.nn.Dropout(said["dropout_structure"][place + 1]))
    network = torch.nn.Sequential(*layers).eval()
    network.load_state_dict({n.removeprefix("linear."): t for n, t in said[width][part].items()})
    return network


def test_a1111_builds_from_the_exported_file_what_was_trained(
    spec: RunSpec, checkpoint: Path, exported: tuple[Path, Path]
) -> None:
    _, file = exported
    assert file.name == "cat.pt"
    said = torch.load(file, weights_only=True)
    _, methods = trained_on_base(spec.base, checkpoint)
    context = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    (member,) = methods.members
    assert isinstance(member, Hypernetwork)
    networks = member.networks.eval()
    for part, letter in enumerate("kv"):
        theirs = context + as_a1111_builds_it(32, said, part)(context)
        torch.testing.assert_close(theirs, networks[f"32_{letter}"](context))
    again = a1111_bytes(member, torch.float32, name="cat", step=3, base="base")
    assert again == file.read_bytes()


def test_images_are_the_same_from_each_form_and_from_the_run(
    spec: RunSpec, checkpoint: Path, exported: tuple[Path, Path], tmp_path: Path
) -> None:
    ours, theirs = exported
    wish = Wish(
        prompts=("a [trigger]",), steps=2, scale=1.0, resolution=32, trigger="rufus", model=spec.base.model
    )
    drawn = [
        generate(path, base, wish, tmp_path / f"{n}")[0].read_bytes()
        for n, (path, base) in enumerate([(ours, None), (theirs, None), (checkpoint, spec.base)])
    ]
    bare = generate(ours, None, replace(wish, scale=0.0), tmp_path / "bare")[0].read_bytes()
    assert drawn[0] == drawn[1] == drawn[2] != bare


def test_beside_an_adapter_each_is_a_file_of_its_own(world: Path, tmp_path: Path) -> None:
    keys = {"train": ["adapter", "hypernetwork"], "rank": 2}
    spec = tiny_spec(world / "base", world / "images", base=keys)
    checkpoint = adapted_checkpoint(spec, tmp_path / "trained", size=0.1)
    wanted = Wanted(to="a1111", name="cat", dtype="fp16")
    files = export_checkpoint(checkpoint, spec, tmp_path / "cat", wanted)
    assert [file.path.name for file in files] == ["cat.safetensors", "cat.pt"]
    assert [file.usage for file in files] == ["<lora:cat:0.8>", "<hypernet:cat:0.8>"]


def test_a_bad_file_is_refused(
    spec: RunSpec, checkpoint: Path, exported: tuple[Path, Path], xl: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match="diffusers loads no hypernetwork"):
        export_checkpoint(checkpoint, spec, tmp_path / "cat", Wanted(to="diffusers", name="cat"))
    _, file = exported
    of_another = load_family(Base(model=str(xl)))
    with pytest.raises(BadInput, match="nothing for 80_k"):
        put_onto(read_hypernetwork(file), of_another, "given", file)
    said = torch.load(file, weights_only=True)
    said[32][1]["linear.0.bias"][0] = torch.nan
    for name, content, why in (
        ("nan.pt", said, "layer 0 of 32_v holds NaN"),
        ("other.pt", {"step": 3}, "holds no hypernetwork"),
        ("odd.pt", {**torch.load(file, weights_only=True), "activation_func": "gelu"}, "gelu is not known"),
        ("code.pt", {32: StopAtStep}, "Weights only load failed"),
    ):
        torch.save(content, tmp_path / name)
        with pytest.raises(BadInput, match=why):
            read_hypernetwork(tmp_path / name)
    (tmp_path / "half.pt").write_bytes(file.read_bytes()[:999])
    with pytest.raises(BadInput, match=r"half\.pt"):
        read_hypernetwork(tmp_path / "half.pt")


def test_a_transformer_is_refused(world: Path, tmp_path: Path) -> None:
    model = build_base(tmp_path / "sd3", "sd3-without-t5")
    spec = tiny_spec(model, world / "images", base={"train": "hypernetwork"})
    (problem,) = adapter_problems([spec])
    assert (problem.code, problem.where) == ("E2333", "base.train")
    with pytest.raises(BadInput, match="a hypernetwork changes what a UNet attends to"):
        attach(spec.base, load_family(spec.base))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"rank": 4},
            "base.rank is of adapter, but base.train is hypernetwork: leave rank out, or train adapt",
        ),
        ({"train_text_encoder": True}, "base.train_text_encoder is of adapter"),
        ({"hypernetwork_layers": [1, 2]}, "the first and the last are 1"),
        ({"hypernetwork_layers": [1]}, "at least 2"),
        ({"hypernetwork_activation": "gelu"}, "Input should be 'linear'"),
        ({"train": "adapter", "hypernetwork_dropout": 0.1}, "base.hypernetwork_dropout is of hypernetwork"),
        ({"train": ["hypernetwork", "hypernetwork"]}, "names something twice"),
    ],
)
def test_what_cannot_work_is_refused(keys: dict[str, Any], said: str) -> None:
    base = {"model": "m", "train": "hypernetwork", **keys}
    with pytest.raises(ValidationError, match=said):
        RunSpec.model_validate({"base": base, "dataset": {"path": "d"}})
