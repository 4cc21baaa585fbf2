"""Products of thin matrices: the best of their rank, and the same change in another rank."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.weights.low_rank import (
    Choice,
    Factors,
    above,
    cumulative,
    extract,
    fixed,
    frobenius,
    missed,
    mix,
    ratio,
    resize,
)

SHAPES = [(24, 16), (16, 40), (12, 8, 3, 3)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def factors(shape: tuple[int, ...], rank: int, *, seed: int = 0, scale: float = 0.5) -> Factors:
    up = random(shape[0], rank, *(1 for _ in shape[2:]), seed=seed)
    return Factors(random(rank, *shape[1:], seed=seed + 1), up, scale)


def optimum(delta: Tensor, rank: int) -> float:
    """The relative error that no product of this rank can be below."""
    squares = torch.linalg.svdvals(delta.flatten(1)).square()
    return float((squares[rank:].sum() / squares.sum()).sqrt())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_a_planted_change_is_recovered(shape: tuple[int, ...], rank: int) -> None:
    planted = factors(shape, rank)

    for found in (extract(planted.delta(), fixed(rank)), resize(planted, fixed(rank))):
        assert found.rank == rank
        assert found.delta().shape == planted.delta().shape
        assert missed(planted.delta(), found) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_no_product_of_the_rank_is_nearer(shape: tuple[int, ...]) -> None:
    whole = factors(shape, 8)
    delta = whole.delta()

    for rank in (1, 4):
        least = optimum(delta, rank)
        assert missed(delta, extract(delta, fixed(rank))) == pytest.approx(least, abs=1e-5)
        assert missed(delta, resize(whole, fixed(rank))) == pytest.approx(least, abs=1e-5)


def test_a_randomised_search_is_nearly_as_good_and_leaves_the_global_generator_alone() -> None:
    delta = random(96, 80) @ torch.diag(0.8 ** torch.arange(80.0)) @ random(80, 96, seed=5)
    state = torch.get_rng_state()

    found = extract(delta, fixed(8), most=8)

    assert torch.equal(torch.get_rng_state(), state)
    assert missed(delta, found) < 1.01 * optimum(delta, 8)


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (fixed(3), 3),
        (fixed(9), 4),
        (above(1.5), 3),
        (above(99.0), 1),
        (ratio(0.6), 2),
        (ratio(0.2), 4),
        (cumulative(8 / 11), 2),
        (cumulative(0.74), 3),
        (cumulative(1.0), 4),
        (frobenius(0.8), 1),
        (frobenius(0.9), 2),
    ],
)
def test_how_many_singular_values_are_kept(keep: Choice, kept: int) -> None:
    assert keep(torch.tensor([5.0, 3.0, 2.0, 1.0])) == kept


@given(st.integers(1, 5), st.integers(1, 5), st.floats(-2, 2), st.floats(-2, 2))
@settings(deadline=None, max_examples=25)
def test_a_mix_is_the_weighted_sum(first: int, second: int, a: float, b: float) -> None:
    shape = (6, 4, 3, 3)
    one, other = factors(shape, first, scale=0.25), factors(shape, second, seed=9, scale=2.0)

    mixed = mix([(one, a), (other, b)])

    assert mixed.rank == first + second
    torch.testing.assert_close(mixed.delta(), a * one.delta() + b * other.delta(), atol=1e-4, rtol=1e-4)


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValueError, match="of the shapes"):
        mix([(factors((4, 4), 1), 1.0), (factors((4, 5), 1), 1.0)])
    with pytest.raises(ValueError, match="NaN"):
        extract(torch.full((3, 3), float("nan")), fixed(1))


def test_no_change_at_all_stays_none() -> None:
    assert missed(torch.zeros(4, 4), extract(torch.zeros(4, 4), ratio(0.5))) == 0.0
