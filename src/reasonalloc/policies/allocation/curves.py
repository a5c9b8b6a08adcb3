"""Budgets for all heads of a model at once from a curve of each: what it costs to hold the head to a budget."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from reasonalloc.policies.allocation.offline_heads import OfflineBudgets
from reasonalloc.policies.allocation.profile import DemandProfile, Floats
from reasonalloc.policies.allocation.shape import ModelShape


def marginal_gain(
    curves: Float[Floats, "budgets heads"], grid: Float[Floats, "budgets"], total: int, floor: int
) -> Int[np.ndarray[Any, Any], "heads"]:
    """Integer budgets that minimise the sum of the curves, on the lower convex hull of each curve.

    Args:
        curves: what each head costs at each budget of the grid; between grid points it falls linearly.
        grid: budgets in tokens, ascending.
        total: tokens to give away.
        floor: tokens that every head gets first.

    Returns:
        int64 budgets, at least ``floor``, summing to ``total`` exactly. Tokens beyond the grid's last budget gain
        nothing and are shared out evenly. Equal gains: the lower index first.

    Raises:
        ValueError: the total does not pay the floors.
    """
    heads = curves.shape[1]
    if total < heads * floor:
        raise ValueError(f"{total} tokens do not pay a floor of {floor} for each of {heads} heads")
    steps = [step for head in range(heads) for step in _hull_steps(grid, curves[:, head], floor, head)]
    budgets = np.full(heads, floor, dtype=np.int64)
    left = total - heads * floor
    for _, head, tokens in sorted(steps, key=lambda step: -step[0]):  # stable, and a head's own gains only fall
        given = min(tokens, left)
        budgets[head] += given
        left -= given
        if not left:
            return budgets
    share, odd = divmod(left, heads)
    return budgets + share + (np.arange(heads) < odd)


def _hull_steps(grid: Floats, curve: Floats, floor: int, head: int) -> list[tuple[float, int, int]]:
    """The segments of a curve's lower convex hull from ``floor`` on, as (gain per token, head, tokens)."""
    above = grid > floor
    points = [(float(floor), float(np.interp(floor, grid, curve))), *zip(grid[above], curve[above], strict=True)]
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    return [(-_slope(a, b), head, int(b[0] - a[0])) for a, b in pairwise(hull) if _slope(a, b) < 0]


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


@dataclass(frozen=True)
class CurveBudgets(OfflineBudgets):
    """The split of all tokens that minimises the sum of all heads' curves.

    Attributes:
        scorer: whose simulated evictions the curves are of. Empty: that of the ``Compression`` it is used in.
    """

    scorer: str = ""

    @abstractmethod
    def curves(self, profile: DemandProfile) -> Float[Floats, "budgets layers kv_heads"]:
        """What each head costs at the budgets of the scorer's grid. Raises ``ValueError`` where it is not known."""

    def least_on(self, grid: Float[Floats, "budgets"], budget: int, window: int) -> int:
        """The floor in tokens: never below the grid, where curves fall fastest and would have to be guessed."""
        return max(self.least(budget, window), int(grid[0]))

    def split(
        self, shape: ModelShape, budget: int, window: int, profile: DemandProfile
    ) -> Int[np.ndarray[Any, Any], "layers kv_heads"]:
        """Tokens of every head. Raises ``ValueError`` where the profile has no curves, or they end too soon."""
        curves = self.curves(profile)
        grid = np.array(profile.grids[self.scorer].budgets, dtype=np.float64)
        if budget > grid[-1]:
            raise ValueError(
                f"the curves of {self.scorer!r} end at {int(grid[-1])} tokens and say nothing about a budget of "
                f"{budget}: calibrate on longer texts, with --miss-budgets up to several times the budget"
            )
        if budget < grid[0]:
            raise ValueError(
                f"the curves of {self.scorer!r} begin at {int(grid[0])} tokens and say nothing about a budget of "
                f"{budget}: calibrate with --miss-budgets from about a quarter of the budget on"
            )
        if not any(np.interp(budget, grid, curve) for curve in curves.reshape(len(grid), -1).T):
            raise ValueError(
                f"with {budget} tokens per head nothing was lost in the calibration texts, so that their curves "
                "say nothing about this budget: calibrate on texts several times as long (--max-new-tokens)"
            )
        total = shape.layers * shape.kv_heads * budget
        budgets = marginal_gain(curves.reshape(len(grid), -1), grid, total, self.least_on(grid, budget, window))
        return budgets.reshape(shape.layers, shape.kv_heads)
