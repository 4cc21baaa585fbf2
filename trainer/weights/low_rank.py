"""Changes of one layer as a product of two thin matrices, and the best such product of a given rank.

A LoRA changes a weight by ``scale · up @ down``. A convolution's factors are ``down`` (R, I, k, k) and ``up``
(O, R, 1, 1); unfolded, they are the matrices (R, I·k·k) and (O, R), and everything here works on these.

The best approximation of rank ``r`` keeps the ``r`` largest singular values, and misses by the root of the
sum of the squares of the others (Eckart & Young 1936).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

OVERSAMPLING = 16
"""How many more directions than asked for a randomised SVD looks at (Halko et al. 2011)."""
ITERATIONS = 6

Choice = Callable[[Tensor], int]
"""Returns how many of the singular values, the largest first, are kept."""


@dataclass(frozen=True, slots=True)
class Factors:
    """A change of one layer: ``scale · up @ down``, fp32."""

    down: Tensor
    """(R, I), or (R, I, k, k)."""
    up: Tensor
    """(O, R), or (O, R, 1, 1)."""
    scale: float = 1.0
    """Alpha over rank."""

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def alpha(self) -> float:
        return self.scale * self.rank

    def delta(self) -> Tensor:
        """Return the change itself, in the shape of the layer's weight: (O, I) or (O, I, k, k)."""
        flat_OI = self.scale * self.up.flatten(1) @ self.down.flatten(1)
        return flat_OI.view(len(self.up), *self.down.shape[1:])


def fixed(rank: int) -> Choice:
    """Keep ``rank`` singular values, or all if there are fewer."""
    return lambda values_R: min(rank, len(values_R))


def above(limit: float) -> Choice:
    """Keep those larger than ``limit``, at least one."""
    return lambda values_R: max(1, int((values_R > limit).sum()))


def ratio(least: float) -> Choice:
    """Keep those of at least the share ``least`` of the largest, at least one."""
    return lambda values_R: max(1, int((values_R >= least * values_R[0]).sum()))


def cumulative(share: float) -> Choice:
    """Keep as few as have together at least ``share`` of the sum of all."""
    return lambda values_R: _as_few_as(values_R, share)


def frobenius(share: float) -> Choice:
    """Keep as few as have together at least ``share`` of the Frobenius norm of the change."""
    return lambda values_R: _as_few_as(values_R.square(), share * share)


def extract(delta: Tensor, keep: Choice, *, most: int | None = None) -> Factors:
    """Return the best product for a change of a weight.

    Args:
        delta: (O, I) or (O, I, k, k).
        most: No more than this rank is looked for: then a randomised SVD does, which is many times as fast.

    Raises:
        ValueError: ``delta`` holds NaN or infinity.
    """
    if not torch.isfinite(delta).all():
        raise ValueError("holds NaN or infinity")
    flat_OI = delta.float().flatten(1)
    if most is not None and most + OVERSAMPLING < min(flat_OI.shape):
        # It draws its directions from the global generator.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u_OR, values_R, v_IR = torch.svd_lowrank(flat_OI, q=most + OVERSAMPLING, niter=ITERATIONS)
        u_OR, values_R, v_RI = u_OR[:, :most], values_R[:most], v_IR[:, :most].T
    else:
        u_OR, values_R, v_RI = torch.linalg.svd(flat_OI, full_matrices=False)
        u_OR, values_R, v_RI = u_OR[:, :most], values_R[:most], v_RI[:most]
    return _balanced(u_OR, values_R, v_RI, keep(values_R), delta.shape)


def resize(factors: Factors, keep: Choice) -> Factors:
    """Return the best product of another rank for the same change, without ever forming the change.

    With ``up = Q_u R_u`` and ``downᵀ = Q_d R_d``, the singular values of the change are those of the small
    matrix ``scale · R_u R_dᵀ``, and its vectors are ``Q`` times that one's.
    """
    q_up_OR, r_up = torch.linalg.qr(factors.up.float().flatten(1))
    q_down_IR, r_down = torch.linalg.qr(factors.down.float().flatten(1).T)
    u, values_R, v = torch.linalg.svd(factors.scale * r_up @ r_down.T, full_matrices=False)
    shape = torch.Size([len(factors.up), *factors.down.shape[1:]])
    return _balanced(q_up_OR @ u, values_R, v @ q_down_IR.T, keep(values_R), shape)


def mix(parts: Sequence[tuple[Factors, float]]) -> Factors:
    """Return the weighted sum of several changes of one layer, exactly: ranks add up.

    Raises:
        ValueError: There are none, or they are of layers of different shapes.
    """
    shapes = {(len(part.up), *part.down.shape[1:]) for part, _ in parts}
    if len(shapes) != 1:
        raise ValueError(f"changes of layers of the shapes {sorted(shapes)}")
    return Factors(
        down=torch.cat([part.down.float() for part, _ in parts]),
        up=torch.cat([part.scale * weight * part.up.float() for part, weight in parts], dim=1),
    )


def missed(delta: Tensor, factors: Factors) -> float:
    """Return the relative error of a product, in the Frobenius norm."""
    norm = float(torch.linalg.vector_norm(delta.float()))
    error = float(torch.linalg.vector_norm(delta.float() - factors.delta()))
    return error / norm if norm else math.inf if error else 0.0


def _as_few_as(amounts_R: Tensor, share: float) -> int:
    total = amounts_R.double().cumsum(0)
    return min(len(amounts_R), int((total < share * total[-1] * (1 - 1e-12)).sum()) + 1)


def _balanced(u_OR: Tensor, values_R: Tensor, v_RI: Tensor, rank: int, shape: torch.Size) -> Factors:
    """Give each factor the root of the singular values: then neither is large, whatever it is stored in."""
    roots_R = values_R[:rank].clamp_min(0).sqrt()
    down_RI = roots_R[:, None] * v_RI[:rank]
    up_OR = u_OR[:, :rank] * roots_R
    inner = shape[1:]
    return Factors(
        down=down_RI.reshape(rank, *inner).contiguous(),
        up=up_OR.reshape(len(up_OR), rank, *(1 for _ in inner[1:])).contiguous(),
    )
