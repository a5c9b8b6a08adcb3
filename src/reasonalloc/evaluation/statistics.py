"""What a difference is worth: intervals clustered on problems, paired tests, correction for several comparisons.

Everything starts from one number a problem, the mean over its samples: samples of one problem are no independent
evidence about others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

Floats = np.ndarray[Any, np.dtype[np.float64]]
LEVEL = 0.95
DRAWS = 10_000
_EQUAL = 1e-12  # means of the same samples in another order differ by less


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Two methods on the same problems.

    Attributes:
        difference: of the means, first minus second, with its interval.
        p: two-sided, of a paired sign-flip test of the mean.
        above, below: problems on which the first is above, and below, the second; on all others they are equal.
        corrected: p corrected for all comparisons made together (Holm); None until ``correct`` was called.
    """

    difference: Estimate
    p: float
    above: int
    below: int
    corrected: float | None = None

    @property
    def real(self) -> bool:
        """Whether the corrected p is below 5 %."""
        return self.corrected is not None and self.corrected < 1 - LEVEL

    @property
    def sign_p(self) -> float:
        """Two-sided p of the exact sign test over the problems that differ; 1 if there is none. Never corrected."""
        differing = self.above + self.below
        return float(stats.binomtest(self.above, differing).pvalue) if differing else 1.0


def mean_score(problems: Float[Floats, "problems"], seed: int = 0) -> Estimate:
    """Mean of scores in [0, 1] over problems, with a bootstrap interval over problems.

    Where no problem differs from the others, resampling has nothing to say; then the interval is that of a binomial
    (Clopper and Pearson). A single problem gives [0, 1].
    """
    count = len(problems)
    if count < 2:
        return Estimate(float(problems.mean()), 0.0, 1.0)
    if np.ptp(problems) == 0:
        mean, far = float(problems[0]), float((1 - LEVEL) / 2) ** (1 / count)
        return Estimate(mean, mean * far, mean + (1 - mean) * (1 - far))
    found = _bootstrap(problems, seed)
    return Estimate(found.mean, max(0.0, found.low), min(1.0, found.high))


def mean_value(problems: Float[Floats, "problems"], seed: int = 0) -> Estimate:
    """Mean of unbounded values over problems, with a bootstrap interval; a single problem has an infinite one."""
    if len(problems) < 2:
        return Estimate(float(problems.mean()), -math.inf, math.inf)
    return _bootstrap(problems, seed)


def compare(
    first: Float[Floats, "problems"], second: Float[Floats, "problems"], seed: int = 0, bounded: bool = True
) -> Comparison:
    """Means over the same problems, in the same order.

    Where all differences are equal, resampling has nothing to say; then shares (``bounded``) get the interval of an
    event that was never seen, at either end, and other values an infinite one.

    Raises:
        ValueError: different problems, or none.
    """
    if first.shape != second.shape:
        raise ValueError(f"methods must be compared on the same problems, got {len(first)} and {len(second)}")
    if not len(first):
        raise ValueError("there is no problem to compare on")
    differences = first - second
    differences[np.abs(differences) <= _EQUAL] = 0
    sides = int((differences > 0).sum()), int((differences < 0).sum())
    if len(differences) < 2 or np.ptp(differences) <= _EQUAL:
        mean = float(differences.mean())
        rare = 1 - ((1 - LEVEL) / 2) ** (1 / len(differences)) if bounded else math.inf
        low, high = mean - rare * (1 + mean), mean + rare * (1 - mean)
        return Comparison(Estimate(mean, low, high), 1.0 if mean == 0 else 2.0 ** (1 - len(differences)), *sides)
    rng = np.random.default_rng(seed)
    signs = rng.integers(0, 2, (DRAWS, len(differences)), dtype=np.int8) * 2 - 1
    flipped = np.abs(signs @ differences)
    reached = int((flipped >= abs(differences.sum()) * (1 - 1e-12)).sum())
    return Comparison(_bootstrap(differences, seed), (reached + 1) / (DRAWS + 1), *sides)


def correct(comparisons: list[Comparison]) -> list[Comparison]:
    """Holm's step-down correction: the chance of any false "real" among all of them stays below 5 %."""
    order = np.argsort([comparison.p for comparison in comparisons], kind="stable")
    corrected, largest = [0.0] * len(comparisons), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, comparisons[i].p * (len(comparisons) - rank)))
        corrected[i] = largest
    return [replace(c, corrected=p) for c, p in zip(comparisons, corrected, strict=True)]


def least_problems(comparisons: int) -> int:
    """Problems that so many comparisons need, so that a difference of one sign on all of them would be real.

    With fewer the sign-flip test's smallest p, ``2 ** (1 - problems)``, does not pass Holm's correction.
    """
    return math.floor(1 + math.log2(comparisons / (1 - LEVEL))) + 1


def inferior(difference: Estimate, margin: float) -> bool | None:
    """Whether the first is worse than the second by more than a margin, where higher is better.

    Decided by the interval of the difference alone: False where all of it lies above -margin, True where all of it
    lies below, None (undecided) otherwise.
    """
    if difference.low > -margin:
        return False
    return True if difference.high < -margin else None


def rank_among(value: float, others: list[float]) -> tuple[int, int]:
    """Place of a method among random splits, 1 the best (ties count against it), and of how many places."""
    return 1 + sum(other >= value for other in others), 1 + len(others)


def _bootstrap(values: Float[Floats, "problems"], seed: int) -> Estimate:
    """Percentile interval of the mean, widened for few problems as Student's t is against the normal law."""
    count = len(values)
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, count, (DRAWS, count))
    mean = float(values.mean())
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(values[picks].mean(1) - mean, [tail, 1 - tail])
    wider = (count / (count - 1)) ** 0.5 * stats.t.ppf(1 - tail, count - 1) / stats.norm.ppf(1 - tail)
    return Estimate(mean, mean + wider * float(low), mean + wider * float(high))
