"""Words are taught without touching any other, alone, before an adapter or beside it; what rests is not
moved; a stopped run ends as if it had never been; and others read the files."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from support.adapters import adapted_checkpoint
from support.tiny_models import build_base
from support.tiny_world import build_images, tiny_spec
from support.training import Lay, StopAtStep, contents, newest

from trainer.attempt import run_attempt
from trainer.config import Base, RunSpec
from trainer.config.textual_inversion import steps_of
from trainer.errors import BadInput
from trainer.export.bundle import Target
from trainer.export.checkpoint import Wanted, export_checkpoint
from trainer.export.token_files import loading
from trainer.families import Family, family_of, load_family
from trainer.families.new_rows import table_of
from trainer.families.source import load_pipeline
from trainer.generate import Wish, generate
from trainer.methods import attach
from trainer.methods.token_norms import held, usual_of
from trainer.optim import build_optimizer, load_optimizer_state, optimizer_state
from trainer.rundir import EXIT_COMPLETE, EXIT_PREEMPTED
from trainer.snapshot import read_adapter
from trainer.stop import Stop
from trainer.tensor_file import read

# Of diffusers' sampler, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

WORDS = [{"token": "<sks>", "words": "dog dog"}, {"token": "<b>", "init": "noise"}]
ALONE: dict[str, Any] = {"train": "textual_inversion", "tokens": WORDS, "token_learning_rate": 1e-2}
PIVOTAL = ALONE | {"train": ["textual_inversion", "adapter"], "tokens_until": 0.5, "adapter_from": 0.5}
TOGETHER = ALONE | {"train": ["adapter", "textual_inversion"], "train_text_encoder": True}
OF_AN_ADAPTER = {"rank": 8, "alpha": None, "lora_dropout": 0.0}
"""Its defaults, where ``tiny_spec`` says something else."""


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SDXL whose configurations say, as the real one's, that texts end with token 2."""
    folder = build_base(tmp_path_factory.mktemp("xl"), "sdxl")
    for encoder in ("text_encoder", "text_encoder_2"):
        file = folder / encoder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 2}))
    return folder


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_images(tmp_path_factory.mktemp("captioned"), count=5, of="<sks>, <b>")


def spec_of(base: Path, images: Path, keys: dict[str, Any], **more: Any) -> RunSpec:
    without = OF_AN_ADAPTER if keys["train"] == "textual_inversion" else {}
    return tiny_spec(base, images, base={**without, "max_train_steps": 4, **keys, **more})


def said(family: Family, text: str) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return family.encode_tokens([family.token_ids(text)])


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_fresh_word_is_the_words_that_it_begins_as(world: Path, xl: Path) -> None:
    for model in (world / "base", xl):
        base = Base(model=str(model), train="textual_inversion", tokens=[{"token": "<sks>", "words": "dog"}])
        family = load_family(base)
        before = said(family, "a photo of a dog"), said(family, "a dog dog")
        attach(base, family)
        assert same(said(family, "a photo of a <sks>"), before[0]), "the pooled vector too"
        assert same(said(family, "a <SKS> dog"), before[1])


def test_rows_begin_as_words_in_turns_as_the_mean_or_as_noise(world: Path) -> None:
    tokens = [
        {"token": "<w>", "words": "dog", "vectors": 3},
        {"token": "<m>", "init": "mean"},
        {"token": "<n>", "init": "noise", "vectors": 2},
    ]
    base = Base(model=str(world / "base"), train="textual_inversion", tokens=tokens, seed=4)
    family = load_family(base)
    (rows,) = attach(base, family).parameters.values()
    table = table_of(family.text_encoders["text_encoder"])
    (dog,) = family.tokenizers[0]("dog", add_special_tokens=False).input_ids
    assert torch.equal(rows[:3], table[[dog] * 3])
    assert torch.equal(rows[3], table.mean(0))
    assert torch.equal(rows, next(iter(attach(base, load_family(base)).parameters.values())))
    assert not torch.equal(rows[4], rows[5])
    ids = family.token_ids("<n>")[0]
    assert ids[1:3] == [len(table) + 4, len(table) + 5], "a word takes as many tokens as it has rows"


@pytest.mark.parametrize("family_name", ["sd1", "sdxl"])
def test_no_other_row_is_touched(
    family_name: str, world: Path, xl: Path, captioned: Path, lay: Lay, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = world / "base" if family_name == "sd1" else xl
    spec = spec_of(model, captioned, ALONE, token_norm="decay")
    kept: list[Family] = []

    def loaded(*given: Any) -> Family:
        kept.append(load_family(*given))
        return kept[-1]

    monkeypatch.setattr("trainer.attempt.load_family", loaded)
    run_dir = lay("run", spec)
    assert run_attempt(run_dir, Stop()) == EXIT_COMPLETE
    (family,), fresh = kept, load_family(spec.base)
    assert family.text_identity() == fresh.text_identity(), "nor what texts are cached by"
    after = {**family.denoiser.state_dict()}
    assert all(torch.equal(tensor, after[name]) for name, tensor in fresh.denoiser.state_dict().items())
    started = attach(spec.base, fresh).parameters
    for name, tensor in read_adapter(newest(run_dir)).items():
        assert name.startswith("tokens.text_encoder")
        assert all((tensor - started[name]).norm(dim=1) > 1e-3), "but each of the word's own was"


@pytest.mark.parametrize(
    ("keys", "stops"),
    [
        (ALONE, [1]),
        (PIVOTAL, [2]),  # the pivot: the adapter has no optimizer state yet
        (PIVOTAL | {"ema_decay": 0.9, "optimizer": "adamw8bit"}, [1, 3]),
    ],
    ids=["alone", "pivotal", "pivotal, averaged"],
)
def test_a_stopped_run_ends_as_if_it_had_never_been(
    keys: dict[str, Any], stops: list[int], world: Path, captioned: Path, lay: Lay
) -> None:
    spec = spec_of(world / "base", captioned, keys)
    calm = lay("calm", spec)
    assert run_attempt(calm, Stop()) == EXIT_COMPLETE
    for step in stops:
        first = lay(f"first {step}", spec)
        assert run_attempt(first, StopAtStep(first, step)) == EXIT_PREEMPTED
        second = lay(f"second {step}", spec, resume=newest(first))
        assert run_attempt(second, Stop()) == EXIT_COMPLETE
        assert contents(newest(second)) == contents(newest(calm))


def test_what_rests_is_not_moved_and_has_no_state(world: Path, captioned: Path, lay: Lay) -> None:
    spec = spec_of(world / "base", captioned, PIVOTAL, token_norm="decay", token_learning_rate=1e-3)
    run_dir = lay("run", spec, every_steps=1)
    assert run_attempt(run_dir, Stop()) == EXIT_COMPLETE
    begun = {name: p.data for name, p in attach(spec.base, load_family(spec.base)).parameters.items()}
    words = [name for name in begun if name.startswith("tokens.")]
    folders = sorted(run_dir.checkpoints.iterdir())
    at = {int(folder.name.removeprefix("step-")): folder for folder in folders}
    half, end = read_adapter(at[2]), read_adapter(at[4])
    moved = {name for name in begun if not torch.equal(half[name], begun[name])}
    assert moved == set(words), "before the pivot only the words"
    assert all(torch.equal(half[name], end[name]) for name in words), "after it they stay"
    assert any(not torch.equal(half[name], end[name]) for name in begun if name not in words)
    state, _ = read(at[2] / "optimizer.safetensors")
    assert {name.partition("#")[0] for name in state} == set(words)
    late, _ = read(at[3] / "optimizer.safetensors")
    steps = {name.partition("#")[0]: float(late[name]) for name in late if name.endswith("#step")}
    assert {steps[name] for name in words} == {2.0}
    assert {step for name, step in steps.items() if name not in words} == {1.0}, "bias correction begins anew"


def test_the_state_of_a_group_is_whole_or_absent(world: Path) -> None:
    base = Base(model=str(world / "base"), **PIVOTAL, max_train_steps=4)
    methods = attach(base, load_family(base))
    optimizer = build_optimizer(base, methods.groups())
    for parameter in methods.at(0):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    saved = optimizer_state(optimizer, methods.parameters)
    again = build_optimizer(base, methods.groups())
    assert load_optimizer_state(again, methods.parameters, saved) is None
    odd = next(name for name in methods.parameters if name.startswith("unet"))
    half = saved | {f"{odd}#step": torch.tensor(1.0)}
    assert "has no optimizer state" in str(load_optimizer_state(again, methods.parameters, half))


def test_a_run_with_words_leaves_nothing_to_those_it_shares_the_base_with(world: Path) -> None:
    with_words = Base(model=str(world / "base"), **TOGETHER)
    plain = Base(model=str(world / "base"), train_text_encoder=True)
    family = load_family(plain)
    before, ids = said(family, "a <sks> dog"), family.token_ids("a <sks> dog")
    first, second = attach(with_words, family, "first"), attach(plain, family, "second")
    assert family.token_ids("a <sks> dog") == ids
    assert same(said(family, "a <sks> dog"), before)
    first.use()
    assert family.token_ids("a <sks> dog") != ids
    with first.aside():
        assert same(said(family, "a <sks> dog"), before)
    second.use()
    assert same(said(family, "a <sks> dog"), before)
    assert second.parameters.keys() == attach(plain, load_family(plain)).parameters.keys()


def test_the_rules_of_length() -> None:
    usual = usual_of(torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 3.0]]))
    assert (usual.mean, usual.median) == (3.0, 3.0)
    rows = torch.tensor([[6.0, 8.0], [0.3, 0.4]])
    decayed = held(rows, "decay", usual, 0.001)  # a tenth of the way from 10 and from 0.5 to 3
    assert torch.allclose(decayed, torch.tensor([[5.58, 7.44], [0.45, 0.6]]))
    assert torch.allclose(held(rows, "decay", usual, 1.0).norm(dim=1), torch.tensor([3.0, 3.0]))
    assert torch.allclose(held(rows, "project", usual, 0.1), torch.tensor([[1.8, 2.4], [1.8, 2.4]]))
    std = torch.tensor([6.0, 8.0, 0.3, 0.4]).std()
    assert torch.allclose(held(rows, "retract", usual, 0.1), rows * (usual.std / std) ** 0.1)
    assert torch.equal(held(rows, "none", usual, 0.1), rows)


def test_a_word_is_no_longer_than_words_are(world: Path, captioned: Path, lay: Lay) -> None:
    usual = usual_of(table_of(load_family(Base(model=str(world / "base"))).text_encoders["text_encoder"]))
    run_dir = lay("run", spec_of(world / "base", captioned, ALONE, token_norm="project"))
    assert run_attempt(run_dir, Stop()) == EXIT_COMPLETE
    (rows,) = read_adapter(newest(run_dir)).values()
    assert torch.allclose(rows.norm(dim=1), torch.full((3,), usual.median))


@pytest.mark.parametrize(
    ("family_name", "keys", "to", "names"),
    [
        ("sd1", ALONE, "diffusers", ["b.safetensors", "sks.safetensors"]),
        ("sd1", PIVOTAL, "a1111", ["cat.safetensors", "cat_emb_b.safetensors", "cat_emb_sks.safetensors"]),
        ("sdxl", ALONE, "hf", ["b.safetensors", "sks.safetensors"]),
    ],
)
def test_exported_files_load_in_diffusers(
    family_name: str,
    keys: dict[str, Any],
    to: Target,
    names: list[str],
    world: Path,
    xl: Path,
    tmp_path: Path,
) -> None:
    model = world / "base" if family_name == "sd1" else xl
    spec = spec_of(model, world / "images", keys)
    checkpoint = adapted_checkpoint(spec, tmp_path / "checkpoints")
    exported = export_checkpoint(checkpoint, spec, tmp_path / "out", Wanted(to=to, name="cat"))
    assert all(each.found["max_prediction_error"] <= 1e-5 for each in exported), "each was loaded anew"
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert [file.removesuffix(".safetensors") for file in files] == [
        name.removesuffix(".safetensors") for name in names
    ]
    rows = read_adapter(checkpoint)
    word = next(each.path for each in exported if each.path.stem.endswith("sks"))
    tensors, _ = read(word)
    if family_name == "sdxl":
        assert torch.equal(tensors["clip_l"], rows["tokens.text_encoder"][:2])
        assert torch.equal(tensors["clip_g"], rows["tokens.text_encoder_2"][:2])
    else:
        assert list(tensors) == ["<sks>" if to == "diffusers" else "emb_params"]
    if to == "hf":
        card = (tmp_path / "out" / "README.md").read_text()
        assert "`sks.safetensors`" in card
        assert "eos_token_id" in card


def test_the_cards_program_gives_diffusers_what_was_trained(xl: Path, tmp_path: Path) -> None:
    spec = spec_of(xl, tmp_path, ALONE)
    checkpoint = adapted_checkpoint(spec, tmp_path / "checkpoints")
    export_checkpoint(checkpoint, spec, tmp_path / "out", Wanted(to="dir", name="cat"))
    pipeline = load_pipeline(spec.base)
    program = "from safetensors.torch import load_file\n" + "\n".join(loading(spec.base, "cat", "sdxl"))
    exec(program.replace("<this folder>", str(tmp_path / "out")), {"pipeline": pipeline})
    with torch.no_grad():
        states, _, pooled, _ = pipeline.encode_prompt("a photo of <sks> by <b>", device="cpu")
    family = load_family(spec.base)
    methods = attach(spec.base, family)
    for name, tensor in read_adapter(checkpoint).items():
        methods.parameters[name].data.copy_(tensor)
    ours = said(family, "a photo of <sks> by <b>")
    assert torch.allclose(states, ours["states"], atol=1e-6)
    assert torch.allclose(pooled, ours["pooled"], atol=1e-6)
    assert family_of(pipeline, spec.base).text_encoders, "it is a pipeline as any other"


def test_images_are_drawn_with_the_words_from_the_run_and_from_its_files(world: Path, tmp_path: Path) -> None:
    spec = spec_of(world / "base", world / "images", PIVOTAL)
    checkpoint = adapted_checkpoint(spec, tmp_path / "checkpoints")
    export_checkpoint(checkpoint, spec, tmp_path / "out", Wanted(to="kohya", name="cat"))
    wish = Wish(prompts=("a <sks> by <b>",), steps=2, resolution=32, scale=1.0, model=str(world / "base"))

    def drawn(path: Path, base: Base | None, name: str) -> bytes:
        return generate(path, base, wish, tmp_path / name)[0].read_bytes()

    from_run = drawn(checkpoint, spec.base, "run")
    assert drawn(tmp_path / "out", None, "files") == from_run
    assert drawn(tmp_path / "out" / "cat.safetensors", None, "adapter") != from_run, "without the words"


def test_shares_of_a_run_become_steps() -> None:
    base = Base(model="", **PIVOTAL, max_train_steps=5)
    assert steps_of(base, "textual_inversion") == range(2)
    assert steps_of(base, "adapter") == range(2, 5)
    assert steps_of(base, "hypernetwork") == range(5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tokens": [{"token": "sks", "words": "x"}]}, "in angle brackets.*<sks>"),
        ({"tokens": [{"token": "<Sks>", "words": "x"}]}, "pattern"),
        ({"tokens": []}, "names none"),
        ({"tokens": [{"token": "<a>"}]}, "add words, a phrase, or set init"),
        ({"tokens": [{"token": "<a>", "words": "x", "init": "mean"}]}, "begins as mean: leave words out"),
        ({"tokens": WORDS + WORDS[:1]}, "names <sks> twice"),
        ({"tokens_until": 0.5}, "nothing would be trained after it"),
        ({"adapter_from": 0.5}, "none is trained"),
        ({"train": "adapter"}, "base.tokens is of textual_inversion"),
        (PIVOTAL | {"adapter_from": 0.8}, "between base.tokens_until .* nothing would be trained"),
        (PIVOTAL | {"max_train_steps": 1, "lr_warmup_steps": 0}, "leaves none of 1 steps"),
        (
            PIVOTAL | {"optimizer": "prodigy", "learning_rate": 1.0, "token_learning_rate": None},
            "never shrinks",
        ),
        ({"optimizer": "prodigy", "learning_rate": 1.0}, "token_learning_rate"),
    ],
)
def test_contradictions_are_refused(keys: dict[str, Any], message: str, world: Path) -> None:
    with pytest.raises(ValidationError, match=message):
        spec_of(world / "base", world / "images", ALONE | keys)


def test_cached_texts_are_refused(world: Path) -> None:
    with pytest.raises(ValidationError, match=r"cache_text.*leave cache_text at auto"):
        tiny_spec(world / "base", world / "images", base=OF_AN_ADAPTER | ALONE, dataset={"cache_text": True})


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ({"token": "<a>", "words": "dog dog dog", "vectors": 2}, "are 3 tokens.*set vectors to 3"),
        ({"token": "<a>", "words": " "}, "take other words"),
    ],
)
def test_words_that_do_not_fit_the_model_are_refused(token: Any, message: str, world: Path) -> None:
    base = Base(model=str(world / "base"), train="textual_inversion", tokens=[token])
    with pytest.raises(BadInput) as refused:
        attach(base, load_family(base))
    assert re.search(message, f"{refused.value} {refused.value.hint}")


def test_a_word_in_no_caption_is_refused(world: Path, lay: Lay) -> None:
    with pytest.raises(BadInput, match="no caption contains <sks>") as refused:
        run_attempt(lay("run", spec_of(world / "base", world / "images", ALONE)), Stop())
    assert 'captions of the images, as in "a photo of <sks>"' in refused.value.hint


def test_sd3_is_refused(tmp_path: Path) -> None:
    base = Base(model=str(build_base(tmp_path / "sd3", "sd3-without-t5")), **ALONE)
    with pytest.raises(BadInput, match="no program loads words"):
        attach(base, load_family(base))
