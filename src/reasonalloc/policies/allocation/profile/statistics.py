"""Sums over prompts, and what they say about positions and about other prompts. Arrays only; knows no profile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from reasonalloc.policies.allocation.profile.measurements import HISTOGRAM_EDGES, Floats


def total(parts: Sequence[Floats]) -> Floats:
    """Sum in the given order; with prompts in the order of their hashes, the same however profiles were merged."""
    found = np.zeros_like(parts[0])
    for part in parts:
        found = found + part
    return found


def ratio_standard_error(
    sums: Float[Floats, "prompts layers"], rows: Float[Floats, "prompts"]
) -> Float[Floats, "layers"]:
    """Standard error over prompts of ``sums.sum(0) / rows.sum()``, a ratio of sums; NaN for a single prompt.

    Linearised (W. G. Cochran, Sampling Techniques, 3rd edition, 1977, chapter 6): a prompt's residual is what its sum
    exceeds the common ratio times its rows by.
    """
    n = len(rows)
    if n < 2:
        return np.full(sums.shape[1], math.nan)
    residual = sums - rows[:, None] * (sums.sum(0) / rows.sum())
    return np.sqrt((residual**2).sum(0) * n / (n - 1)) / rows.sum()


def histogram_quantiles(
    counts: Int[np.ndarray[Any, Any], "layers query_heads bins"], shares: Sequence[float]
) -> Float[Floats, "shares layers query_heads"]:
    """Quantiles in tokens of what was counted into ``HISTOGRAM_EDGES``, as the upper edge of their bin."""
    covered = counts.cumsum(-1) / counts.sum(-1, keepdims=True)
    edges = np.array(HISTOGRAM_EDGES, dtype=np.float64)
    return np.stack([edges[(covered < share).sum(-1).clip(max=len(edges) - 1)] for share in shares])
