"""Hollowed Net: the UNet without its deepest layers is the whole one at LoRA initialisation, at every cut."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from support.adapters import adapted_checkpoint
from support.tiny_models import build_base
from support.tiny_world import tiny_spec
from support.training import Lay, contents, events, interrupted, newest
from torch import Tensor

from trainer.attempt import prepare, run_attempt
from trainer.config import Base, RunSpec
from trainer.errors import BadInput, TrainerError
from trainer.export import trained_adapter, verify_export
from trainer.export.files import Form, write_weights
from trainer.families import Family, load_family
from trainer.families.hollow import cut_at
from trainer.families.stable_diffusion import HIDDEN, UNetFamily
from trainer.methods import attach
from trainer.snapshot import read_adapter
from trainer.stop import Stop

CUTS = {"sd1": 12, "sdxl": 9}
"""Skip connections, one of which stays."""
SHORT = {"max_train_steps": 3, "train_batch_size": 1}
EVERY_CUT = [(family, cut) for family, count in CUTS.items() for cut in range(count)]

# Of diffusers' sampler, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: build_base(tmp_path_factory.mktemp(name) / "base", name) for name in CUTS}


def given_to(family: Family) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Latents whose sides are no multiple of eight, timesteps, and what the denoiser is told besides."""
    numbers = torch.Generator().manual_seed(1)
    said = family.encode_tokens([family.token_ids("a dog"), family.token_ids("")])
    sizes = torch.tensor([[40.0, 32, 0, 8, 48, 32]] * 2)
    noisy = torch.randn((2, 4, 6, 4), generator=numbers)
    return noisy, torch.tensor([20, 700]), said | family.size_conditioning(sizes)


@pytest.mark.parametrize(("name", "cut"), EVERY_CUT)
def test_it_equals_the_whole_unet_and_leads_the_same_gradients(
    bases: dict[str, Path], name: str, cut: int
) -> None:
    base = Base(model=str(bases[name]), rank=2, hollow=cut, targets=("conv1", "conv2", "conv_out"))
    family = load_family(base)
    assert isinstance(family, UNetFamily)
    assert family.cut is not None
    methods = attach(base, family)
    methods.use()
    noisy, timesteps, told = given_to(family)
    hidden, parameters = family.hidden(noisy, timesteps, told), parameters_of(family)

    def gradients(cut_off: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        predicted = family.predict(noisy, timesteps, told | cut_off)
        return predicted, list(torch.autograd.grad(predicted.square().sum(), [*methods.parameters.values()]))

    rest, of_rest = gradients(hidden)
    assert HIDDEN in hidden
    assert parameters_of(family) < parameters
    family.predict(noisy, timesteps, told)  # whole again
    last = family.denoiser.get_submodule(family.cut.last)
    hook = last.register_forward_hook(
        lambda module, args, out: (out[0].detach(),) if isinstance(out, tuple) else out.detach()
    )
    whole, of_whole = gradients({})
    hook.remove()

    assert torch.equal(rest, whole)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(of_rest, of_whole, strict=True))
    assert any(bool(gradient.any()) for gradient in of_rest)


def parameters_of(family: Family) -> int:
    return sum(parameter.numel() for parameter in family.denoiser.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", CUTS)
def test_on_a_gpu_it_equals_the_whole_unet_and_holds_less(
    bases: dict[str, Path], name: str, precision: Literal["no", "bf16"]
) -> None:
    family = load_family(Base(model=str(bases[name]), hollow=2, mixed_precision=precision))
    noisy, timesteps, told = given_to(family)
    noisy, timesteps = noisy.to(family.device), timesteps.to(family.device)
    told = {key: part.to(family.device) for key, part in told.items()}
    hidden = family.hidden(noisy, timesteps, told)
    with torch.no_grad():
        whole = family.predict(noisy, timesteps, told)
        held = torch.cuda.memory_allocated()
        rest = family.predict(noisy, timesteps, told | hidden)

    assert torch.cuda.memory_allocated() < held
    assert torch.equal(rest, whole)


@pytest.mark.parametrize("name", CUTS)
def test_all_that_is_trained_goes_back_to_the_whole_unet(bases: dict[str, Path], name: str) -> None:
    plain = Base(model=str(bases[name]), rank=2, targets=("time_emb_proj", "conv1", "conv_out"))
    whole = load_family(plain)
    theirs = attach(plain, whole).parameters
    fresh = {key: parameter.data.clone() for key, parameter in theirs.items()}
    given, numbers = given_to(whole), torch.Generator().manual_seed(2)
    for cut in range(CUTS[name]):
        hollowed = load_family(plain.model_copy(update={"hollow": cut}))
        mine = attach(plain, hollowed).parameters
        assert hollowed.cut
        gone = {key for key in theirs if hollowed.cut.removes(key.removeprefix("unet."))}
        assert mine.keys() == theirs.keys() - gone
        for key in mine:
            mine[key].data = torch.randn(mine[key].shape, generator=numbers) / 10
        for key in theirs:
            theirs[key].data.copy_(mine[key].data if key in mine else fresh[key])
        with torch.no_grad():
            assert torch.equal(hollowed.predict(*given), whole.predict(*given))


@pytest.mark.parametrize(("name", "cut", "form"), [("sd1", "auto", "kohya"), ("sdxl", 1, "diffusers")])
def test_what_is_trained_is_of_the_whole_unet(
    bases: dict[str, Path], name: str, cut: int | str, form: Form, tmp_path: Path
) -> None:
    """Every tensor has the name of its module in the whole UNet, onto which it is loaded."""
    spec = tiny_spec(bases[name], tmp_path, base={"hollow": cut, "targets": "attention", "conv_rank": 2})
    folder = adapted_checkpoint(spec, tmp_path / "checkpoints")
    tensors = read_adapter(folder)
    whole = {module for module, _ in load_family(Base(model=str(bases[name]))).denoiser.named_modules()}
    modules = {key.removeprefix("unet.").rpartition(".lora_")[0] for key in tensors}

    assert modules <= whole
    assert not any("mid_block" in module for module in modules)
    trained = trained_adapter(folder, spec)
    assert verify_export(write_weights(trained, tmp_path, form), trained)["modules"] == len(modules)


def test_a_cut_is_named_by_its_number_or_by_the_first_layer_that_stays() -> None:
    putting = [("conv_in",), ("down_blocks.0.resnets.0",), ("down_blocks.1.resnets.0", "down_blocks.1.a.0")]
    taking = [
        ("up_blocks.0.resnets.0", "up_blocks.0.attentions.0"),
        ("up_blocks.0.resnets.1", "up_blocks.0.upsamplers.0"),
        ("up_blocks.1.resnets.0",),
    ]

    assert cut_at(0, putting, taking).removed == ("mid_block",)
    assert cut_at(0, putting, taking).last == "mid_block"
    assert cut_at("up_blocks.0.1", putting, taking) == cut_at(1, putting, taking)
    assert cut_at(1, putting, taking).last == "up_blocks.0.attentions.0"
    assert cut_at("up_blocks.1", putting, taking) == cut_at(2, putting, taking)
    assert cut_at(2, putting, taking).removed == (
        *("down_blocks.0.resnets.0", "down_blocks.1.resnets.0", "down_blocks.1.a.0", "mid_block"),
        *("up_blocks.0.resnets.0", "up_blocks.0.attentions.0"),
        *("up_blocks.0.resnets.1", "up_blocks.0.upsamplers.0"),
    )
    for wanted in (3, "up_blocks.2", "up_blocks.1.1"):
        with pytest.raises(BadInput, match=r"base\.hollow"):
            cut_at(wanted, putting, taking)


def test_stopped_equals_never_stopped(world: Path, lay: Lay) -> None:
    """With captions that vary and a prior; validated and drawn with the whole UNet on the way."""
    spec = tiny_spec(
        *(world / "base", world / "images"),
        base={**SHORT, "hollow": 2, "hollow_pool": 3, "max_train_steps": 2},
        dataset={"tag_dropout": 0.3, "shuffle_caption": True},
        prior={"prompt": "a dog", "online": True},
        validation={"every": 1, "timesteps": 1},
        samples={"prompts": ["a dog"], "every": 1, "steps": 1},
    )
    straight, first, second = interrupted(lay, spec, 1)

    assert contents(newest(second)) == contents(newest(straight))
    seen = [[e["val/loss"] for e in events(run_dir, "validation")] for run_dir in (first, second, straight)]
    assert [*seen[0], *seen[1]] == seen[2]


def test_the_first_loss_is_that_of_plain_lora(world: Path, lay: Lay) -> None:
    """Samples are looked at alone, passes have several: the last bits may differ."""
    losses = []
    for name, base in (("plain", {}), ("hollow", {"hollow": 3})):
        prior = {"prompt": "a dog", "images": 2, "steps": 1}
        keys = {**SHORT, "train_batch_size": 2, "max_train_steps": 1, "lr_warmup_steps": 0, **base}
        run_dir = lay(
            name, tiny_spec(world / "base", world / "images", base=keys, prior=prior), micro_batch=2
        )
        run_attempt(run_dir, Stop())
        losses += [event["loss"] for event in events(run_dir, "step")]

    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


class Killed(Exception):
    pass


@pytest.fixture
def computed(lay: Lay, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Prepares a run in shards of four samples, and returns how many were computed for it."""
    monkeypatch.setattr("trainer.hidden.SHARD", 4)
    ordinary = UNetFamily.hidden

    def prepared(name: str, spec: RunSpec, *, dies_after: int = 999, **base: Any) -> int:
        count = 0

        def counted(*given: Any) -> dict[str, Tensor]:
            nonlocal count
            if count == dies_after:
                raise Killed
            count += 1
            return ordinary(*given)

        monkeypatch.setattr(UNetFamily, "hidden", counted)
        changed = spec.model_copy(update={"base": spec.base.model_copy(update=base)})
        with contextlib.suppress(Killed):
            prepare(lay(name, changed), Stop())
        return count

    return prepared


def test_shards_that_are_there_are_not_computed_again(
    world: Path, computed: Callable[..., int], tmp_path: Path
) -> None:
    spec = tiny_spec(world / "base", world / "images", base={"hollow": 1, "max_train_steps": 2, "seed": 8})

    assert computed("killed", spec, dies_after=6) == 6  # of two shards of four one is whole
    assert computed("again", spec) == 4
    assert computed("sweep", spec, learning_rate=0.5, rank=2, loss="huber") == 0
    assert computed("longer", spec, max_train_steps=3) == 4
    assert computed("seed", spec, seed=9) == 8
    assert computed("cut", spec, hollow=2) == 8
    captioned = tiny_spec(
        world / "base", world / "images", base=spec.base.model_dump(), dataset={"trigger": "x"}
    )
    assert computed("same captions", captioned) == 0


def test_another_caption_or_image_is_another_shard(
    world: Path, computed: Callable[..., int], tmp_path: Path
) -> None:
    images = shutil.copytree(world / "images", tmp_path / "images")
    spec = tiny_spec(world / "base", images, base={"hollow": 1, "max_train_steps": 2, "seed": 5})
    assert computed("first", spec) == 8

    captions = (images / "metadata.jsonl").read_text()
    (images / "metadata.jsonl").write_text(captions.replace("a dog", "the dog"))
    assert computed("captions", spec) == 8
    for n in range(5):
        shutil.copy(images / "05.png", images / f"{n:02}.png")
    assert computed("images", spec) == 8


def test_another_unet_layout_library_or_platform_is_another_shard(
    world: Path, computed: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts and latents are the same, so that the cut-off part is given the same, too."""
    small = {**SHORT, "hollow": 1, "hollow_pool": 2, "seed": 7}
    spec = tiny_spec(world / "base", world / "images", base=small)
    tuned = shutil.copytree(world / "base", tmp_path / "tuned")
    weights = tuned / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: 1.01 * tensor for name, tensor in load_file(weights).items()}, weights)

    assert computed("first", spec) == 2
    assert computed("unet", spec, model=str(tuned)) == 2
    assert computed("layout", spec, channels_last=True) == 2
    monkeypatch.setattr("trainer.hidden.platform_fingerprint", lambda device: "another kind of GPU")
    assert computed("platform", spec) == 2
    monkeypatch.setattr("diffusers.__version__", "9.9.9")
    assert computed("platform and diffusers", spec) == 2


def test_a_damaged_shard_is_computed_again_and_one_that_vanishes_ends_the_attempt(
    world: Path, lay: Lay, computed: Callable[..., int]
) -> None:
    spec = tiny_spec(world / "base", world / "images", base={"hollow": 1, "seed": 6, **SHORT})
    before = set((world / "cache").glob("*/*.safetensors"))
    assert computed("first", spec) == 6
    shards = set((world / "cache").glob("*/*.safetensors")) - before
    for shard in shards:
        shard.write_bytes(shard.read_bytes()[:-1])
    assert computed("damaged", spec) == 6

    parts = prepare(lay("run", spec), Stop())
    for shard in shards:
        shard.unlink()
    with pytest.raises(TrainerError, match="no longer in this node's cache"):
        parts.beside.conditioning(parts.training.batches(0, 2)[0])


def test_a_pool_goes_round(world: Path, lay: Lay) -> None:
    spec = tiny_spec(world / "base", world / "images", base={"hollow": 1, "hollow_pool": 6})
    training = prepare(lay("run", spec), Stop()).training

    assert training.distinct == 6
    first, again = training.samples([1, 7])
    assert (first.n, again.n) == (1, 7)
    assert again.caption == first.caption
    assert torch.equal(first.x0_CHW, again.x0_CHW)
    assert torch.equal(first.noise_CHW, again.noise_CHW)
    assert int(first.timestep) == int(again.timestep)
    assert [training.drawn_as(n) for n in (5, 6, -1, -6, -7)] == [5, 0, -1, -6, -1]


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ({"hollow": -1}, "base.hollow"),
        ({"hollow": "down_blocks.1"}, "base.hollow"),
        ({"hollow": 3, "hollow_pool": 0}, "base.hollow_pool"),
        ({"hollow": 3, "train_text_encoder": True}, "train_text_encoder would change"),
        ({"hollow": 3, "train": ["full"]}, "base.train full would change it"),
    ],
)
def test_what_cannot_be_is_refused(base: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        tiny_spec(Path("m"), Path("d"), base={"lora_dropout": 0.0, "rank": 8, **base})


def test_targets_that_are_taken_out_are_named(bases: dict[str, Path]) -> None:
    for cut, targets, said in (
        (6, "attention", "all of them are only in layers that base.hollow takes out"),
        (1, ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "to_k"), "to_q is only in layers"),
    ):
        base = Base(model=str(bases["sdxl"]), hollow=cut, targets=targets)
        with pytest.raises(BadInput, match=said):
            attach(base, load_family(base))


def test_a_model_without_a_unet_or_without_a_middle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="has no UNet"):
        load_family(Base(model=str(build_base(tmp_path / "sd3", "sd3")), hollow="auto"))
