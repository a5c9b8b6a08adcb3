"""How far a profile can be trusted: a bootstrap over its prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from reasonalloc.policies.allocation import DemandProfile, MissCurveLayers, WaveLayers, marginal_gain
from reasonalloc.policies.allocation.apportion import smooth
from reasonalloc.policies.allocation.layers import split_over_layers
from reasonalloc.policies.allocation.profile import Floats

WIDEST = 0.10  # relative width of a band above which more prompts are advised


@dataclass(frozen=True)
class Stability:
    """Percentile bands over bootstrap samples of the prompts.

    Attributes:
        wave, wave_low, wave_high: demand per layer, in tokens.
        budgets, budget_low, budget_high: tokens per head (layer total over its heads) that "wave" layers give.
        budget: mean tokens per head that these budgets are for.
        prompts: how many there were.
        level: of the bands.
    """

    wave: Float[Floats, "layers"]
    wave_low: Float[Floats, "layers"]
    wave_high: Float[Floats, "layers"]
    budgets: Float[Floats, "layers"]
    budget_low: Float[Floats, "layers"]
    budget_high: Float[Floats, "layers"]
    budget: int
    prompts: int
    level: float

    @property
    def widths(self) -> Float[Floats, "layers"]:
        """Width of each layer's band, relative to its demand."""
        return (self.wave_high - self.wave_low) / np.maximum(self.wave, np.finfo(np.float64).tiny)

    @property
    def budget_widths(self) -> Float[Floats, "layers"]:
        """Width of the band of each layer's budget, relative to that budget."""
        return (self.budget_high - self.budget_low) / self.budgets

    def advice(self) -> str | None:
        """A warning where a budget's band is wider than 10 %, and how many prompts might do; None where none is.

        Budgets follow the shape of the wave alone. Its height also varies with the length of the texts, so the
        demand's own bands are wider.
        """
        if self.prompts < 2:
            return "one prompt says nothing about others: calibrate on at least eight"
        widest = float(self.budget_widths.max())
        if widest <= WIDEST:
            return None
        enough = math.ceil(self.prompts * (widest / WIDEST) ** 2)
        return (
            f"the {self.level:.0%} band of the budget is wider than {WIDEST:.0%} in "
            f"{int((self.budget_widths > WIDEST).sum())} of {len(self.wave)} layers (widest: layer "
            f"{int(self.budget_widths.argmax())}, {widest:.0%}); bands shrink with the square root of the number "
            f"of prompts, so about {enough} instead of {self.prompts} would do"
        )


def bootstrap(
    profile: DemandProfile,
    rho: float | None = None,
    budget: int = 128,
    layers: WaveLayers | None = None,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Stability:
    """Resample the prompts of a profile; see ``Stability``.

    Args:
        profile: with one prompt the bands have no width.
        rho: share of attention mass; None is the one nearest the paper's.
        budget: mean tokens per head that layer budgets are computed for.
        layers: the allocator of these budgets; None is the default "wave".
        draws: bootstrap samples.
        level: of the bands, in (0, 1).
        seed: of the resampling.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    layers = layers or WaveLayers(rho=profile.reference_rho if rho is None else rho)
    if rho not in (None, layers.rho):
        raise ValueError(f"rho is {rho}, but that of the layer allocator {layers.rho}: pass one of them")
    rho = layers.rho
    at, n = profile.rho_index(rho), len(profile.prompts)
    sums = np.stack([prompt.sums[at].mean(-1) for prompt in profile.prompts])
    rows = np.array([prompt.rows for prompt in profile.prompts], dtype=np.float64)
    times = np.random.default_rng(seed).multinomial(n, [1 / n] * n, size=draws).astype(np.float64)
    waves = (times @ sums) / (times @ rows)[:, None]
    budgets = _budgets(waves, profile, budget, layers)
    found = layers.allocate(profile.shape, budget, 0, profile).numpy() / profile.shape.kv_heads
    tail = (1 - level) / 2
    wave_low, wave_high = np.quantile(waves, [tail, 1 - tail], axis=0)
    budget_low, budget_high = np.quantile(budgets, [tail, 1 - tail], axis=0)
    return Stability(profile.layer_demand(rho), wave_low, wave_high, found, budget_low, budget_high, budget, n, level)


def head_skew(
    profile: DemandProfile, rho: float | None = None, draws: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """How many times as much the neediest query head of a layer asks for as its least needy one, median over layers.

    Args:
        profile: with one prompt the interval has no width.
        rho: share of attention mass; None is the one nearest the paper's.
        draws: bootstrap samples of the prompts.
        level: of the interval.
        seed: of the resampling.

    Returns:
        What was found, and the interval's ends.
    """
    at, n = profile.rho_index(profile.reference_rho if rho is None else rho), len(profile.prompts)
    sums = np.stack([prompt.sums[at] for prompt in profile.prompts])

    def skew(times: Float[Floats, "prompts"]) -> float:  # every prompt's sums are over as many rows for all heads
        heads = np.tensordot(times, sums, 1)
        return float(np.median(heads.max(-1) / heads.min(-1)))

    times = np.random.default_rng(seed).multinomial(n, [1 / n] * n, size=draws).astype(np.float64)
    low, high = np.quantile([skew(drawn) for drawn in times], [(1 - level) / 2, (1 + level) / 2])
    return skew(np.ones(n)), float(low), float(high)


@dataclass(frozen=True)
class MissStability:
    """Percentile bands of the budgets that miss curves give, over bootstrap samples of the prompts.

    Attributes:
        budgets, low, high: tokens of each key/value head.
    """

    budgets: Int[np.ndarray[Any, Any], "layers kv_heads"]
    low: Float[Floats, "layers kv_heads"]
    high: Float[Floats, "layers kv_heads"]

    @property
    def widths(self) -> Float[Floats, "layers kv_heads"]:
        """Width of each head's band, relative to its budget."""
        return (self.high - self.low) / self.budgets


def bootstrap_miss_curves(
    profile: DemandProfile,
    scorer: str,
    budget: int = 128,
    window: int = 8,
    draws: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> MissStability:
    """Resample the prompts of a profile and split ``budget`` by the miss curves of each sample.

    Args:
        profile: with miss curves of ``scorer``.
        scorer: whose curves.
        budget: mean tokens per head.
        window: newest tokens that every head keeps.
        draws: bootstrap samples.
        level: of the bands.
        seed: of the resampling.

    Raises:
        ValueError: no such curves, or they end below the budget.
    """
    policy = MissCurveLayers(scorer=scorer)
    found = policy.budgets(profile.shape, budget, window, profile)
    grid = np.array(profile.grids[scorer].budgets, dtype=np.float64)
    sums = np.stack([prompt.misses[scorer].reshape(len(grid), -1) for prompt in profile.prompts])
    rows = np.array([prompt.rows for prompt in profile.prompts], dtype=np.float64)
    n = len(rows)
    times = np.random.default_rng(seed).multinomial(n, [1 / n] * n, size=draws).astype(np.float64)
    splits = [
        marginal_gain(
            np.tensordot(t, sums, 1) / (t @ rows), grid, int(found.sum()), policy.least_on(grid, budget, window)
        )
        for t in times
    ]
    tail = (1 - level) / 2
    low, high = np.quantile(splits, [tail, 1 - tail], axis=0).reshape(2, *found.shape)
    return MissStability(found, low, high)


def _budgets(
    waves: Float[Floats, "draws layers"], profile: DemandProfile, budget: int, layers: WaveLayers
) -> np.ndarray[Any, Any]:
    weights = smooth(torch.from_numpy(waves), layers.exponent)
    totals = split_over_layers(weights, profile.shape, budget, 0, layers.lower, layers.upper)
    return totals.numpy() / profile.shape.kv_heads
