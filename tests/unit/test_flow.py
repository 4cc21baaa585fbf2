"""Identities of flow matching, and the noise levels that diffusers' scheduler trains and samples at."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from trainer.objective.flow import FlowMatching
from trainer.randomness import generator

X0, NOISE = (torch.randn((3, 4, 2, 2), generator=generator(0, name, 0)) for name in ("x0", "noise"))
TIMESTEPS = torch.tensor([125.0, 500.0, 937.5])


def test_image_and_noise_follow_from_the_noisy_image_and_its_target() -> None:
    flow = FlowMatching(1000, 3.0)
    noisy, target = flow.add_noise(X0, NOISE, TIMESTEPS), flow.target(X0, NOISE, TIMESTEPS)
    share = (TIMESTEPS / 1000).view(-1, 1, 1, 1)

    torch.testing.assert_close(noisy - share * target, X0)
    torch.testing.assert_close(noisy + (1 - share) * target, NOISE)
    assert torch.equal(flow.add_noise(X0, NOISE, torch.zeros(3)), X0)
    assert torch.equal(flow.add_noise(X0, NOISE, torch.full((3,), 1000.0)), NOISE)


def test_an_error_of_the_prediction_is_so_many_times_that_of_the_image() -> None:
    flow = FlowMatching(1000, 3.0)
    noisy, target = flow.add_noise(X0, NOISE, TIMESTEPS), flow.target(X0, NOISE, TIMESTEPS)
    predicted = target + 0.1 * torch.randn(target.shape, generator=generator(0, "error", 0))
    share = (TIMESTEPS / 1000).view(-1, 1, 1, 1)

    error = (predicted - target).square().flatten(1).sum(1)
    error_x0 = (noisy - share * predicted - X0).square().flatten(1).sum(1)

    torch.testing.assert_close(error, flow.per_x0(TIMESTEPS) * error_x0, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(flow.snr(TIMESTEPS), ((1 - TIMESTEPS / 1000) / (TIMESTEPS / 1000)) ** 2)
    assert torch.isfinite(flow.per_x0(torch.tensor([0.0, 1000.0]))).all()


def test_the_shift_is_that_of_diffusers() -> None:
    flow = FlowMatching(1000, 3.0)
    theirs = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    plain = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)

    ours = torch.tensor([flow._shifted(float(share)) for share in plain.sigmas])

    torch.testing.assert_close(ours, theirs.sigmas)
    back = torch.tensor([flow._before_shift(float(share)) for share in theirs.sigmas])
    torch.testing.assert_close(back, plain.sigmas)


@pytest.mark.parametrize(("first", "end"), [(0, 1000), (200, 700), (999, 1000)])
@pytest.mark.parametrize("sampling", ["auto", "uniform", "logit_normal"])
def test_timesteps_stay_within_their_range(first: int, end: int, sampling: str) -> None:
    flow = FlowMatching(1000, 3.0)
    drawn = torch.stack([flow.draw_timestep(generator(0, "t", n), first, end, sampling) for n in range(100)])

    assert bool(((first <= drawn) & (drawn <= end)).all())
    assert len(set(drawn.tolist())) > 90
    assert drawn.dtype == torch.float32


def test_logit_normal_draws_the_middle_more_often_and_the_shift_more_noise() -> None:
    def share_within(shift: float, sampling: str, low: float, high: float) -> float:
        flow = FlowMatching(1000, shift)
        drawn = [float(flow.draw_timestep(generator(0, "t", n), 0, 1000, sampling)) for n in range(2000)]
        return sum(low <= t < high for t in drawn) / len(drawn)

    # Within one standard deviation of zero lie 68 % of normal numbers: sigmoid(-1) to sigmoid(1).
    assert abs(share_within(1.0, "logit_normal", 268.9, 731.1) - 0.683) < 0.03
    assert abs(share_within(1.0, "uniform", 268.9, 731.1) - 0.462) < 0.03
    assert share_within(3.0, "logit_normal", 500, 1001) > 0.8


def test_fixed_timesteps_lie_in_the_middle_of_their_shares() -> None:
    assert FlowMatching(1000, 3.0).fixed_timesteps(4).tolist() == [125.0, 375.0, 625.0, 875.0]
