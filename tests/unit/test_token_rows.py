"""What the rows of taught words begin as, and when and how far what keeps them short moves them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import build_base
from support.tiny_world import build_images, tiny_spec
from support.training import Lay
from torch import Tensor

from trainer.attempt import prepare
from trainer.config import Base
from trainer.families import load_family
from trainer.families.new_rows import table_of
from trainer.methods import attach
from trainer.methods.token_norms import held, usual_of
from trainer.step import Stepper
from trainer.stop import Stop

# Of diffusers' sampler, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def taught(model: Path, **keys: Any) -> Base:
    return Base.model_validate({"model": str(model), "train": "textual_inversion", **keys})


def rows_of(base: Base) -> dict[str, Tensor]:
    """The rows before the first step, by text encoder, in units of the spread of its table."""
    family = load_family(base)
    found = attach(base, family).parameters
    stds = {f"tokens.{name}": table_of(encoder).std() for name, encoder in family.text_encoders.items()}
    return {name: rows.detach() / stds[name] for name, rows in found.items()}


def test_noise_is_as_wide_as_the_table_and_of_its_seed_word_and_encoder_alone(tmp_path: Path) -> None:
    model = build_base(tmp_path / "xl", "sdxl")
    noise = [{"token": f"<{word}>", "init": "noise", "vectors": 30} for word in ("a", "b")]
    first, other = (rows_of(taught(model, tokens=noise, seed=seed)) for seed in (1, 2))
    (clip_l, clip_g) = first.values()
    drawn = [clip_l[:30], clip_l[30:], clip_g[:30], clip_g[30:], *other.values()]
    for rows in drawn:
        assert rows.std() == pytest.approx(1.0, rel=0.2)
        assert rows.mean() == pytest.approx(0.0, abs=0.2)
    starts = {tuple(rows.flatten()[:4].tolist()) for rows in drawn}
    assert len(starts) == len(drawn), "no two begin alike"
    alone = rows_of(taught(model, tokens=noise[1:], seed=1))
    assert torch.equal(alone["tokens.text_encoder"], clip_l[30:]), "whatever other words there are"


def test_lengths_are_held_at_the_rate_of_the_words_and_while_they_are_taught(world: Path) -> None:
    base = taught(
        world / "base",
        train=["textual_inversion", "adapter"],
        tokens=[{"token": "<n>", "init": "noise", "vectors": 2}],
        token_norm="decay",
        learning_rate=1e-4,
        token_learning_rate=2e-3,
        tokens_until=0.5,
        adapter_from=0.5,
        max_train_steps=4,
    )
    family = load_family(base)
    usual = usual_of(table_of(family.text_encoders["text_encoder"]))
    methods = attach(base, family)
    rows = methods.parameters["tokens.text_encoder"]
    rows.data *= 3
    before = rows.detach().clone()
    methods.at(1)
    methods.updated(1e-4)
    assert torch.allclose(rows, held(before, "decay", usual, 2e-3), rtol=1e-6)
    assert not torch.allclose(rows, held(before, "decay", usual, 1e-4), rtol=1e-3)

    taught_until = rows.detach().clone()
    methods.at(2)
    methods.updated(1e-4)
    assert torch.equal(rows, taught_until)


def test_a_step_that_overflows_in_fp16_leaves_the_words_as_they_are(
    world: Path, lay: Lay, tmp_path: Path
) -> None:
    spec = tiny_spec(
        *(world / "base", build_images(tmp_path / "images", of="<sks>")),
        base={
            "train": "textual_inversion",
            "tokens": [{"token": "<sks>", "words": "dog"}],
            "token_norm": "project",
        },
    )
    parts = prepare(lay("run", spec), Stop())
    usual = usual_of(table_of(parts.family.text_encoders["text_encoder"]))
    fp16 = spec.model_copy(update={"base": spec.base.model_copy(update={"mixed_precision": "fp16"})})
    stepper = Stepper(replace(parts, spec=fp16), None)
    (rows,) = parts.methods.parameters.values()
    rows.data *= 3
    before = rows.detach().clone()

    overflow = rows.register_hook(lambda gradient: gradient * torch.inf)
    stepper.take(1)
    overflow.remove()
    assert (stepper.scaler_state or {})["scale"] == 2**15, "the step was not skipped, so this proves nothing"
    assert torch.equal(rows, before)
    stepper.take(2)
    assert torch.allclose(rows.norm(dim=1), torch.full((1,), usual.median))
