"""What a prediction costs: weights of noise levels, pseudo-Huber, masks, and the noise itself."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from support.tiny_world import tiny_spec
from support.training import Lay
from torch import Tensor

from trainer.attempt import prepare
from trainer.config import Base, RunSpec
from trainer.errors import BadInput
from trainer.objective import Objective
from trainer.objective.flow import FlowMatching
from trainer.objective.noise import Draws, sample_noise, seen_noise
from trainer.objective.process import Diffusion
from trainer.randomness import generator
from trainer.step import Stepper
from trainer.stop import Stop

ALPHA_BAR = torch.tensor([0.999, 0.95, 0.7, 0.3, 0.05, 0.01])
ZERO_TERMINAL = torch.tensor([1.0, 0.5, 0.0])
SNR = ALPHA_BAR / (1 - ALPHA_BAR)
TIMESTEPS = torch.arange(len(ALPHA_BAR))


def weighted(snr: Tensor) -> dict[str, Tensor]:
    """The weight of the squared error of x0 by each weighting, at its default settings."""
    return {
        "min_snr": snr.clamp(max=5),
        "soft_min_snr": 5 * snr / (snr + 5),
        "debiased": snr.sqrt(),
        "p2": snr / (1 + snr),
    }


WEIGHTED = weighted(SNR)
KINDS = ("epsilon", "v_prediction", "sample")


def objective(kind: str = "epsilon", alpha_bar: Tensor = ALPHA_BAR, **keys: Any) -> Objective:
    return Objective(Base(model="m", **keys), Diffusion(alpha_bar, kind))


def drawn(n: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(0, "test", n))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighting", WEIGHTED)
def test_a_weighting_is_one_weight_of_x0_whatever_the_model_predicts(kind: str, weighting: str) -> None:
    """The same guess of x0, said as noise, as velocity or as itself, costs the same."""
    process = Diffusion(ALPHA_BAR, kind)
    x0, noise, wrong = (drawn(n, len(SNR), 4, 5, 5) for n in range(3))
    a, s = ALPHA_BAR.sqrt().view(-1, 1, 1, 1), (1 - ALPHA_BAR).sqrt().view(-1, 1, 1, 1)
    guess = x0 + 0.1 * wrong
    said = process.target(guess, (process.add_noise(x0, noise, TIMESTEPS) - a * guess) / s, TIMESTEPS)

    losses = objective(kind, loss_weighting=weighting).losses(
        said, process.target(x0, noise, TIMESTEPS), TIMESTEPS, None
    )

    error_of_x0 = (guess - x0).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(losses, WEIGHTED[weighting] * error_of_x0, rtol=1e-3, atol=0)


@pytest.mark.parametrize("weighting", WEIGHTED)
def test_it_is_the_same_weight_for_flow_matching(weighting: str) -> None:
    process = FlowMatching(1000, shift=3.0)
    timesteps = torch.tensor([50.0, 300, 500, 900])
    share = (timesteps / 1000).view(-1, 1, 1, 1)
    snr = ((1 - share) / share).square().flatten()
    x0, noise, wrong = (drawn(n, 4, 4, 5, 5) for n in range(3))
    guess = x0 + 0.1 * wrong
    said = (process.add_noise(x0, noise, timesteps) - guess) / share

    base = Base.model_validate({"model": "m", "loss_weighting": weighting})
    losses = Objective(base, process).losses(said, process.target(x0, noise, timesteps), timesteps, None)

    expected = weighted(snr)[weighting] * (guess - x0).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_uniform_is_the_plain_loss_of_what_is_predicted(kind: str) -> None:
    predicted, target = drawn(0, 6, 4, 5, 5), drawn(1, 6, 4, 5, 5)

    losses = objective(kind).losses(predicted, target, TIMESTEPS, None)

    assert torch.equal(losses, (predicted - target).square().flatten(1).mean(1))
    assert objective(kind).weights(TIMESTEPS).tolist() == [1.0] * 6


def test_for_epsilon_the_weights_are_those_that_papers_print() -> None:
    found = {name: objective(loss_weighting=name).weights(TIMESTEPS) for name in WEIGHTED}

    torch.testing.assert_close(found["min_snr"], (5 / SNR).clamp(max=1))
    torch.testing.assert_close(found["soft_min_snr"], 5 / (SNR + 5))
    torch.testing.assert_close(found["debiased"], SNR.rsqrt())
    torch.testing.assert_close(found["p2"], 1 / (1 + SNR))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighting", WEIGHTED)
def test_without_noise_and_without_signal_weights_are_finite(kind: str, weighting: str) -> None:
    for floor in (0.0, 0.25):
        weights = objective(kind, ZERO_TERMINAL, loss_weighting=weighting, loss_weight_floor=floor).weights(
            torch.arange(3)
        )
        assert torch.isfinite(weights).all()
        assert float(weights.min()) >= floor


def test_at_zero_terminal_snr_the_last_timestep_of_a_v_model_counts_by_the_floor() -> None:
    def last(**keys: Any) -> float:
        made = objective("v_prediction", ZERO_TERMINAL, loss_weighting="min_snr", **keys)
        return float(made.weights(torch.tensor([2])))

    assert last() == pytest.approx(0, abs=1e-5)
    assert last(loss_weight_floor=0.5) == 0.5


def test_pseudo_huber_is_squared_for_a_large_c_and_absolute_for_a_small_one() -> None:
    predicted, target = drawn(0, 6, 4, 5, 5), drawn(1, 6, 4, 5, 5)
    difference = predicted - target

    def losses(loss: str, c: float) -> Tensor:
        made = objective(loss=loss, huber_c=c, huber_schedule="constant")
        return made.losses(predicted, target, TIMESTEPS, None)

    squared, absolute = difference.square().flatten(1).mean(1), difference.abs().flatten(1).mean(1)
    torch.testing.assert_close(losses("huber", 1e4), squared)
    torch.testing.assert_close(losses("smooth_l1", 1e4) * 1e4, squared)
    torch.testing.assert_close(losses("smooth_l1", 1e-6), 2 * absolute, rtol=1e-4, atol=0)
    by_definition = 0.2 * ((difference.square() + 0.01).sqrt() - 0.1)
    torch.testing.assert_close(losses("huber", 0.1), by_definition.flatten(1).mean(1))


def test_the_schedules_of_c_go_from_1_without_noise_to_c() -> None:
    alpha_bar = torch.linspace(0.999999, 1e-9, 1000)

    def c(schedule: str) -> Tensor:
        made = objective("epsilon", alpha_bar, loss="huber", huber_schedule=schedule)
        return made.huber_c(torch.tensor([0, 500, 999]))

    assert c("constant").tolist() == pytest.approx([0.1] * 3)
    assert c("exponential").tolist() == pytest.approx([1, math.sqrt(0.1), 0.1], rel=1e-2)
    assert c("snr").tolist() == pytest.approx([1, 0.9 / 4 + 0.1, 0.1], rel=1e-2)


def test_what_a_mask_leaves_out_has_no_gradient() -> None:
    predicted = drawn(0, 2, 4, 6, 6).requires_grad_()
    mask = torch.ones(2, 1, 6, 6)
    mask[0, :, :3] = 0
    mask[1, :, :, 2:] = 0.5

    whole = objective().losses(predicted, torch.zeros(2, 4, 6, 6), TIMESTEPS[:2], None)
    losses = objective().losses(predicted, torch.zeros(2, 4, 6, 6), TIMESTEPS[:2], mask)
    losses.sum().backward()  # type: ignore[no-untyped-call]

    assert predicted.grad is not None
    assert predicted.grad[0, :, :3].count_nonzero() == 0
    assert predicted.grad[0, :, 3:].count_nonzero() == 4 * 3 * 6
    expected = (predicted.detach().square() * mask).flatten(1).mean(1)
    torch.testing.assert_close(losses.detach(), expected)
    assert (losses < whole).all()


@pytest.mark.parametrize(
    ("keys", "named"),
    [({"max_timestep": 7}, "max_timestep 7 is beyond the 6"), ({"min_timestep": 6}, "min_timestep 6")],
)
def test_timesteps_beyond_the_schedule_are_refused(keys: dict[str, Any], named: str) -> None:
    objective(max_timestep=6, min_timestep=5)

    with pytest.raises(BadInput, match=named):
        objective(**keys)


@pytest.mark.parametrize(
    ("base", "prior", "said"),
    [
        ({"min_timestep": 5, "max_timestep": 5}, {}, "raise max_timestep to 6 or more"),
        ({"noise_offset": 0.1, "multires_noise_iterations": 6}, {}, "set noise_offset to 0"),
        ({"adaptive_noise_scale": 0.1, "multires_noise_iterations": 6}, {}, "set adaptive_noise_scale to 0"),
        ({"loss": "huber", "huber_c": 2}, {}, "set huber_schedule to constant"),
        ({}, {"online": True, "path": "dogs"}, "leave out prior.path"),
        ({}, {"path": "dogs", "prompt": ["a dog", "a cat"]}, "name one, or leave out prior.path"),
        ({}, {"path": "s3://bucket/dogs"}, "a local folder"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(
    base: dict[str, Any], prior: dict[str, Any], said: str
) -> None:
    blocks: dict[str, Any] = {"base": {"model": "m"}, "dataset": {"path": "d"}, "prior": {"prompt": "a dog"}}
    RunSpec.model_validate(blocks)

    with pytest.raises(ValidationError, match=said):
        RunSpec.model_validate(
            {**blocks, "base": {**blocks["base"], **base}, "prior": {**blocks["prior"], **prior}}
        )


def draws(n: int) -> Draws:
    return lambda purpose: generator(0, purpose, n)


def noises(count: int = 400, shape: tuple[int, ...] = (4, 8, 8), **keys: Any) -> Tensor:
    base = Base(model="m", **keys)
    x0 = torch.full(shape, 2.0)
    return torch.stack([sample_noise(base, x0, draws(n)) for n in range(count)])


def test_plain_noise_is_the_generators_own() -> None:
    """The bytes of every run so far depend on it."""
    assert torch.equal(noises(1)[0], torch.randn((4, 8, 8), generator=generator(0, "noise", 0)))


def test_an_offset_moves_channels_as_a_whole() -> None:
    plain, offset, adaptive = noises(), noises(noise_offset=0.5), noises(adaptive_noise_scale=0.25)

    moved = offset - plain
    torch.testing.assert_close(moved, moved[..., :1, :1].expand_as(moved))
    assert float(moved[..., 0, 0].std()) == pytest.approx(0.5, rel=0.1)
    torch.testing.assert_close(adaptive, offset)  # 0.25 times the latents' mean of 2


def test_pyramid_noise_has_deviation_1_and_is_alike_in_the_neighbourhood() -> None:
    plain, pyramid = noises(), noises(multires_noise_iterations=6, multires_noise_discount=0.8)

    def neighbours(noise: Tensor) -> float:
        return float((noise[..., 1:] * noise[..., :-1]).mean())

    torch.testing.assert_close(pyramid.flatten(1).std(1), torch.ones(400))
    assert abs(neighbours(plain)) < 0.02
    assert neighbours(pyramid) > 0.2
    assert torch.isfinite(noises(4, (4, 1, 3), multires_noise_iterations=16)).all()


def test_a_perturbed_input_is_not_what_is_predicted() -> None:
    plain, base = noises(400), Base(model="m", input_perturbation=0.3)
    seen = [seen_noise(base, noise, draws(n)) for n, noise in enumerate(plain)]

    assert torch.equal(noises(400, input_perturbation=0.3), plain)
    assert float((torch.stack([s for s in seen if s is not None]) - plain).std()) == pytest.approx(
        0.3, rel=0.02
    )
    assert seen_noise(Base(model="m"), plain[0], draws(0)) is None


def test_the_model_sees_the_perturbed_noise_and_should_predict_the_plain_one(world: Path, lay: Lay) -> None:
    base = {"input_perturbation": 0.9, "lora_dropout": 0.0}
    parts = prepare(lay("run", tiny_spec(world / "base", world / "images", base=base)), Stop())
    family, (batch, *_) = parts.family, parts.training.batches(0, 1)
    assert batch.seen_noise_BCHW is not None
    noisy = family.process.add_noise(batch.x0_BCHW, batch.seen_noise_BCHW, batch.timesteps_B)

    loss = Stepper(parts, None)._loss(batch)

    with torch.no_grad():
        predicted = family.predict(noisy, batch.timesteps_B, parts.texts.conditioning(batch.captions))
    assert float((batch.seen_noise_BCHW - batch.noise_BCHW).std()) > 0.5
    assert float(loss.detach()) == pytest.approx(
        float((predicted - batch.noise_BCHW).square().mean()), rel=1e-4
    )


@pytest.mark.parametrize("sampling", ["auto", "uniform", "logit_normal"])
def test_timesteps_fill_their_range_and_no_more(sampling: str) -> None:
    process = Diffusion(torch.linspace(0.99, 0.01, 1000), "epsilon")
    timesteps = torch.stack(
        [process.draw_timestep(generator(0, "timestep", n), 200, 204, sampling) for n in range(800)]
    )
    counts = torch.bincount(timesteps - 200)

    assert len(counts) == 4
    middle = float(counts[1:3].sum() / 800)
    assert middle == pytest.approx(0.73 if sampling == "logit_normal" else 0.5, abs=0.05)
