"""The robustification operator R(.): from raw demands to integer budgets with an exact total.

ReasonAlloc (arXiv 2606.11164) applies one operator to layers (exponent gamma) and to heads (exponent beta):
smooth the demands, scale them to the total, clip, redistribute. The paper gives the parts; the order and the
exactness are ours: water filling instead of one renormalising pass, integers by largest remainder.
Everything here is batched over leading dimensions, in float64 and int64, without synchronising with the host.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

_NEAR = 1e-9  # two shares (in tokens) closer than this are equal: float64 noise, far below one token
# Relative weights: no demand at all ranks below the least demand, and gets tokens only when all others are full.
_LEAST_DEMAND, _NO_DEMAND = 1e-280, 1e-290


def robustify(
    demand: Float[Tensor, "*batch items"],
    total: int,
    *,
    exponent: float = 0.5,
    lower: float = 0.25,
    upper: float = 2.0,
) -> Int[Tensor, "*batch items"]:
    """R(.) of the paper: integer budgets for ``items`` from raw demands, summing to ``total`` exactly.

    Args:
        demand: non-negative raw demands; an all-zero row means "no preference" and is split evenly.
        total: tokens to give away per row.
        exponent: smoothing power (0.5 in the paper, for layers and for heads).
        lower: least share, in multiples of the mean share ``total / items`` (0.25 in the paper).
        upper: largest share, likewise (2 in the paper).

    Returns:
        int64 budgets. They conserve the total, respect the bounds (rounded inwards where that is feasible), are
        monotone in the demand, and do not depend on the demand's scale. Equal shares: the lower index gets
        the odd token.

    Raises:
        ValueError: a negative or non-finite demand, a negative total, or bounds that no split can meet.
    """
    if not bool(torch.isfinite(demand).all()) or bool((demand < 0).any()):
        raise ValueError(f"demands must be finite and not negative, got {demand.tolist()}")
    if demand.shape[-1] == 0:
        raise ValueError("there is no item to give tokens to")
    if total < 0:
        raise ValueError(f"the total must not be negative, got {total}")
    check_operator(exponent, lower, upper)
    mean = torch.full_like(demand, total / demand.shape[-1], dtype=torch.float64)
    return apportion(smooth(demand, exponent), total, lower * mean, upper * mean)


def check_operator(exponent: float, lower: float, upper: float) -> None:
    """Validate the settings of R(.); raises ``ValueError``."""
    if not 0 <= exponent < math.inf:
        raise ValueError(f"the exponent must be finite and not negative, got {exponent}")
    if not 0 <= lower <= 1 <= upper < math.inf:
        raise ValueError(
            f"bounds must be finite with 0 <= lower <= 1 <= upper (multiples of the mean), got {lower}, {upper}; "
            "the number of items is an upper bound that never binds"
        )


def smooth(demand: Float[Tensor, "*batch items"], exponent: float) -> Float[Tensor, "*batch items"]:
    """``demand ** exponent`` in float64; above 1 relative to the largest, as only ratios matter."""
    demand = demand.to(torch.float64)
    if exponent > 1:
        largest = demand.amax(-1, keepdim=True)
        demand = demand / largest.where(largest > 0, torch.ones_like(largest))
    return demand**exponent


def apportion(
    weights: Float[Tensor, "*batch items"],
    total: int | Int[Tensor, "*batch"],
    lower: Float[Tensor, "*batch items"],
    upper: Float[Tensor, "*batch items"],
) -> Int[Tensor, "*batch items"]:
    """Integers in proportion to ``weights``, within absolute bounds, summing to ``total`` exactly.

    ``lower.sum() <= total <= upper.sum()`` must hold in every row; it is the caller's to ensure (checking here
    would synchronise with the host).
    """
    wanted = torch.as_tensor(total, dtype=torch.float64, device=weights.device).expand(weights.shape[:-1])[..., None]
    lower, upper = _integer_bounds(lower.to(torch.float64), upper.to(torch.float64), wanted)
    weights = _strictly_positive(weights.to(torch.float64))
    return _largest_remainder(_water_fill(weights, wanted, lower, upper), wanted, weights)


def _strictly_positive(weights: Tensor) -> Tensor:
    largest = weights.amax(-1, keepdim=True)
    relative = (weights / largest).clamp(min=_LEAST_DEMAND).where(weights > 0, torch.full_like(weights, _NO_DEMAND))
    return relative.where(largest > 0, torch.ones_like(weights))


def _integer_bounds(lower: Tensor, upper: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds rounded inwards, so that rounding cannot break them; outwards where that leaves no solution."""
    low, high = torch.ceil(lower - _NEAR), torch.floor(upper + _NEAR)
    low = low.where(low.sum(-1, keepdim=True) <= total, torch.floor(lower + _NEAR))
    high = high.where(high.sum(-1, keepdim=True) >= total, torch.ceil(upper - _NEAR))
    return low, torch.maximum(low, high)


def _water_fill(weights: Tensor, total: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """The split ``clip(level * weights, lower, upper)`` whose level makes it sum to ``total``.

    The sum is a non-decreasing, piecewise linear function of the level with kinks where an item meets a bound,
    so the level lies between two neighbouring kinks and follows by interpolation: the exact fixed point of
    "clip, then redistribute over the items that are not at a bound, until it converges".
    """
    kinks = torch.cat([lower / weights, upper / weights], -1).sort(-1).values
    split = (kinks[..., None] * weights[..., None, :]).clamp(lower[..., None, :], upper[..., None, :])
    sums = split.sum(-1)
    left = ((sums <= total).sum(-1, keepdim=True) - 1).clamp(0, kinks.shape[-1] - 2)
    low, high = kinks.gather(-1, left), kinks.gather(-1, left + 1)
    below, above = sums.gather(-1, left), sums.gather(-1, left + 1)
    rise = (above - below).clamp(min=0)
    part = ((total - below) / rise.where(rise > 0, torch.ones_like(rise))).clamp(0, 1)
    return ((low + part * (high - low)) * weights).clamp(lower, upper)


def _largest_remainder(shares: Tensor, total: Tensor, weights: Tensor) -> Tensor:
    """Whole tokens; those that rounding down left over go to the largest remainders, ties to the lower index."""
    whole = torch.floor(shares + _NEAR)
    rest = ((shares - whole).clamp(min=0) / _NEAR).round()  # in units of noise: equal remainders compare equal
    order = _lexicographic(-rest)
    rank = torch.empty_like(order).scatter_(-1, order, _indices(order))
    # Of shares that differ by noise alone, the larger weight must not come behind: swap ranks among such equals.
    by_weight, by_rank = _lexicographic(whole, rest, -weights), _lexicographic(whole, rest, rank)
    rank = rank.scatter(-1, by_weight, rank.gather(-1, by_rank))
    return (whole + (rank < total - whole.sum(-1, keepdim=True))).to(torch.int64)


def _lexicographic(*keys: Tensor) -> Tensor:
    """Order by the first key, then the next; equal items keep their index order."""
    order = _indices(keys[0])
    for key in reversed(keys):
        order = order.gather(-1, key.gather(-1, order).argsort(dim=-1, stable=True))
    return order


def _indices(like: Tensor) -> Tensor:
    return torch.arange(like.shape[-1], device=like.device).expand_as(like)
