"""What the free choices between a profile and its budgets do: rho, the exponent gamma, and the clip bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import spearmanr

from reasonalloc.calibration.compare import wave_distance
from reasonalloc.policies.allocation import DemandProfile, WaveLayers
from reasonalloc.policies.allocation.profile import Floats

EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
BOUNDS = ((0.5, 1.5), (0.25, 2.0), (0.1, 4.0), (0.0, 1e9))


@dataclass(frozen=True)
class Choice:
    """Budgets under one choice, beside those under the reference choice.

    Attributes:
        rho, exponent, lower, upper: the choice.
        budgets: tokens per head in each layer, on average over its heads.
        moved: share of all tokens that lie in another layer than under the reference.
    """

    rho: float
    exponent: float
    lower: float
    upper: float
    budgets: Float[Floats, "layers"]
    moved: float


@dataclass(frozen=True)
class RhoEffect:
    """The wave at one rho, beside the reference rho.

    Attributes:
        distance: Wasserstein-1 of the normalised waves over relative depth.
        correlation: Spearman's, over layers.
        choice: the budgets.
    """

    distance: float
    correlation: float
    choice: Choice


def rho_effects(profile: DemandProfile, budget: int) -> list[RhoEffect]:
    """One row for each measured rho; the reference is the one nearest the paper's."""
    base = profile.layer_demand(profile.reference_rho)
    effects = []
    for rho in profile.rhos:
        wave = profile.layer_demand(rho)
        correlation = float(spearmanr(base, wave).statistic) if np.ptp(wave) and np.ptp(base) else float("nan")
        effects.append(RhoEffect(wave_distance(base, wave), correlation, _choice(profile, budget, rho=rho)))
    return effects


def operator_effects(
    profile: DemandProfile,
    budget: int,
    exponents: Sequence[float] = EXPONENTS,
    bounds: Sequence[tuple[float, float]] = BOUNDS,
) -> list[Choice]:
    """One row for each exponent and pair of bounds (multiples of the mean), at the reference rho."""
    return [
        _choice(profile, budget, exponent=exponent, lower=lower, upper=min(upper, float(profile.shape.layers)))
        for exponent in exponents
        for lower, upper in bounds
    ]


def _choice(profile: DemandProfile, budget: int, **changes: float) -> Choice:
    allocator = WaveLayers(**{"rho": profile.reference_rho, **changes})
    reference = _budgets(profile, budget, WaveLayers(rho=profile.reference_rho))
    budgets = _budgets(profile, budget, allocator)
    moved = float(np.abs(budgets - reference).sum() / 2 / reference.sum())
    heads = profile.shape.kv_heads
    return Choice(allocator.rho, allocator.exponent, allocator.lower, allocator.upper, budgets / heads, moved)


def _budgets(profile: DemandProfile, budget: int, allocator: WaveLayers) -> Int[np.ndarray[Any, Any], "layers"]:
    return allocator.allocate(profile.shape, budget, 0, profile).numpy()
