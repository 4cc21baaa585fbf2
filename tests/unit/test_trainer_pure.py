"""Randomness, data order, learning rate, objective: what a run's n-th sample and step are."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.captions import caption_of
from trainer.config import Base, Dataset
from trainer.data import crop, crop_corner, draw, split
from trainer.encode import fit
from trainer.objective import Objective
from trainer.objective.process import Diffusion
from trainer.optim import learning_rate, load_optimizer_state, optimizer_state
from trainer.randomness import generator, key
from trainer.tensor_file import read, write


def numbers(seed: int, purpose: str, n: int) -> list[float]:
    return torch.randn(4, generator=generator(seed, purpose, n)).tolist()


def test_a_generator_depends_on_its_arguments_only() -> None:
    before = numbers(1, "noise", 5)
    torch.manual_seed(99)
    numbers(1, "noise", 4)
    state = torch.get_rng_state()

    assert numbers(1, "noise", 5) == before
    assert torch.equal(torch.get_rng_state(), state), "the global generator was touched"


def test_seed_purpose_and_number_each_make_another_stream() -> None:
    streams = [numbers(*k) for k in ((1, "noise", 5), (2, "noise", 5), (1, "crop", 5), (1, "noise", 6))]

    assert len({tuple(stream) for stream in streams}) == 4


def test_the_key_of_a_stream_never_changes() -> None:
    """Another key would silently change what every interrupted run resumes into."""
    assert key(0, "noise", 0) == 0x1A30FC0F22099EC2


@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_a_sample_does_not_depend_on_the_ones_before_it(n: int, other: int) -> None:
    alone = draw(n, views=2, seed=1)
    draw(other, views=2, seed=1)

    assert draw(n, views=2, seed=1) == alone
    assert 0 <= alone.top < 1
    assert 0 <= alone.left < 1


def test_captions_and_flips_come_at_their_rates() -> None:
    dataset = Dataset(path="x", caption_dropout=0.2)
    dropped = sum(caption_of(dataset, "a dog", 0, n) == "" for n in range(2000))

    assert 0.17 < dropped / 2000 < 0.23
    assert 0.46 < sum(draw(n, views=2, seed=0).view for n in range(2000)) / 2000 < 0.54


def test_the_split_is_the_same_for_every_seed_and_leaves_nothing_out() -> None:
    train, validation = split(10, 3)

    assert sorted(train + validation) == list(range(10))
    assert (len(train), len(validation)) == (7, 3)
    assert split(10, 3) == (train, validation)


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({}, [1, 1, 1, 1]),
        ({"lr_warmup_steps": 3}, [1 / 4, 2 / 4, 3 / 4, 1]),
        ({"lr_scheduler": "linear"}, [1, 3 / 4, 2 / 4, 1 / 4]),
        ({"lr_scheduler": "linear", "lr_warmup_steps": 2}, [1 / 3, 2 / 3, 1, 1 / 2]),
        ({"lr_scheduler": "cosine"}, [1, (1 + math.sqrt(0.5)) / 2, 1 / 2, (1 - math.sqrt(0.5)) / 2]),
        ({"lr_scheduler": "cosine", "lr_warmup_steps": 1}, [1 / 2, 1, 3 / 4, 1 / 4]),
    ],
)
def test_learning_rate(changes: dict[str, Any], rates: list[float]) -> None:
    base = Base(model="m", max_train_steps=4, learning_rate=2.0, **changes)

    assert [learning_rate(base, step) / 2 for step in range(4)] == pytest.approx(rates)


ALPHA_BAR = torch.tensor([0.9, 0.5, 0.01]).double()
TIMESTEPS = torch.arange(3)


def case() -> tuple[torch.Tensor, torch.Tensor]:
    x0, noise = torch.randn(2, 3, 4, 5, 5, generator=generator(0, "test", 0)).double()
    return x0, noise


def test_the_targets_recover_the_clean_latent() -> None:
    x0, noise = case()
    x_t = Diffusion(ALPHA_BAR, "epsilon").add_noise(x0, noise, TIMESTEPS)
    a, s = ALPHA_BAR.sqrt().view(3, 1, 1, 1), (1 - ALPHA_BAR).sqrt().view(3, 1, 1, 1)

    v = Diffusion(ALPHA_BAR, "v_prediction").target(x0, noise, TIMESTEPS)

    assert Diffusion(ALPHA_BAR, "epsilon").target(x0, noise, TIMESTEPS) is noise
    assert Diffusion(ALPHA_BAR, "sample").target(x0, noise, TIMESTEPS) is x0
    torch.testing.assert_close(a * x_t - s * v, x0)
    torch.testing.assert_close(s * x_t + a * v, noise)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_an_error_in_x0_is_weighted_by_the_signal_to_noise_ratio(kind: str) -> None:
    """|e' - e|² = SNR |x' - x|² and |v' - v|² = (SNR + 1) |x' - x|²."""
    x0, noise = case()
    process = Diffusion(ALPHA_BAR, kind)
    x_t = process.add_noise(x0, noise, TIMESTEPS)
    guess = x0 + 0.1
    a, s = ALPHA_BAR.sqrt().view(3, 1, 1, 1), (1 - ALPHA_BAR).sqrt().view(3, 1, 1, 1)
    implied = process.target(guess, (x_t - a * guess) / s, TIMESTEPS)

    error = (implied - process.target(x0, noise, TIMESTEPS)).square().mean(dim=(1, 2, 3))

    torch.testing.assert_close(error, process.per_x0(TIMESTEPS) * 0.01)


def test_the_loss_is_computed_in_fp32() -> None:
    half = torch.full((1, 4, 8, 8), 300.0, dtype=torch.float16)
    objective = Objective(Base(model="m"), Diffusion(ALPHA_BAR, "epsilon"))

    assert objective.losses(half, torch.zeros_like(half), TIMESTEPS[:1], None).tolist() == [90_000]


def test_an_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(ValueError, match="got 'x0'"):
        Diffusion(ALPHA_BAR, "x0")


@pytest.mark.parametrize(
    ("count", "total", "timesteps"), [(1, 1000, [500]), (4, 1000, [125, 375, 625, 875]), (3, 3, [0, 1, 2])]
)
def test_validation_timesteps_lie_in_the_middle_of_their_shares(
    count: int, total: int, timesteps: list[int]
) -> None:
    process = Diffusion(torch.linspace(0.99, 0.01, total), "epsilon")
    assert process.fixed_timesteps(count).tolist() == timesteps


def test_a_crop_reaches_both_edges_and_no_further() -> None:
    latents = torch.arange(12).view(1, 2, 6)

    for place, seen in ((0.0, [[[0, 1], [6, 7]]]), (0.999, [[[4, 5], [10, 11]]])):
        assert crop(latents, (2, 2), crop_corner(latents, (2, 2), place, place)).tolist() == seen


@pytest.mark.parametrize(
    ("size", "target", "cut", "expected", "offset"),
    [
        ((100, 50), (32, 32), True, (32, 32), (0, 16)),
        ((100, 50), (32, 32), False, (64, 32), (0, 0)),
        ((50, 90), (32, 32), False, (32, 56), (1, 0)),
        ((10, 10), (32, 32), False, (32, 32), (0, 0)),
        ((100, 50), (24, 40), True, (40, 24), (0, 4)),
        ((50, 100), (24, 40), False, (40, 80), (0, 0)),
    ],
)
def test_images_are_scaled_to_cover_what_they_are_trained_at(
    size: tuple[int, int],
    target: tuple[int, int],
    cut: bool,
    expected: tuple[int, int],
    offset: tuple[int, int],
) -> None:
    from PIL import Image

    fitted = fit(Image.new("RGB", size), target, cut=cut, multiple=8)
    assert (fitted.image.size, fitted.offset) == (expected, offset)


def test_an_optimizer_that_has_not_moved_yet_is_resumed_and_one_that_lost_state_is_not(
    tmp_path: Path,
) -> None:
    """The fp16 scaler skips steps until the gradient fits."""
    parameters = {name: torch.nn.Parameter(torch.ones(3)) for name in ("w", "v")}
    optimizer = torch.optim.AdamW(list(parameters.values()))
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    scaler.scale(sum((p * 1e39).sum() for p in parameters.values())).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    nothing = optimizer_state(optimizer, parameters)
    assert nothing == {}, "the step was not skipped, so this proves nothing"
    scaler.update()
    for parameter in parameters.values():
        parameter.grad = torch.ones(3)
    optimizer.step()
    whole = optimizer_state(optimizer, parameters)

    fresh = torch.optim.AdamW(list(parameters.values()))
    write(tmp_path / "optimizer.safetensors", nothing, {})
    assert load_optimizer_state(fresh, parameters, read(tmp_path / "optimizer.safetensors")[0]) is None
    half = {name: tensor for name, tensor in whole.items() if name.startswith("w")}
    assert load_optimizer_state(fresh, parameters, half) == "v has no optimizer state"
    assert load_optimizer_state(fresh, parameters, whole) is None
