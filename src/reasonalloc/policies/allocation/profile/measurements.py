"""What calibration measures: the demand of one prompt's chain of thought, and the grids that it is measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

PAPER_RHO = 0.93
# Upper edges of the histogram of N_rho: single tokens up to 16, then four bins an octave, up to 2 ** 24 tokens.
HISTOGRAM_EDGES: tuple[int, ...] = (*range(1, 17), *(int(2 ** (4 + step / 4)) for step in range(1, 81)))

Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class PromptDemand:
    """What one prompt's chain of thought asked for.

    Attributes:
        hash: SHA-256 of the prompt's text (hexadecimal).
        rows: decode positions that were measured.
        sums: ``N_rho`` summed over the positions, for each rho, layer and query head (whole numbers).
        misses: for each simulated scorer the attention mass that fell on tokens it had evicted, summed over the
            positions, at each of its grid's budgets, per layer and key/value head (mean over its query heads).
        task: a label, for comparisons.
        tokens: generated tokens.
        sensitivity: rise of the answer's negative log-likelihood, in nats over all its tokens, when one key/value head
            alone keeps only a short window; None if it was not measured.
        losses: for some of the simulated scorers, what each key/value head adds to KL(full || compressed) when all are
            held to a budget of the grid, in nats, summed over the answer's tokens; negative where holding it helps.
    """

    hash: str
    rows: int
    sums: Float[Floats, "rhos layers query_heads"]
    misses: Mapping[str, Float[Floats, "budgets layers kv_heads"]] = field(default_factory=dict)
    task: str = ""
    tokens: int = 0
    sensitivity: Float[Floats, "layers kv_heads"] | None = None
    losses: Mapping[str, Float[Floats, "budgets layers kv_heads"]] = field(default_factory=dict)


@dataclass(frozen=True)
class MissGrid:
    """How a scorer's eviction was simulated for its curves.

    Attributes:
        budgets: tokens per head, ascending.
        interval: decoded tokens between two simulated compressions.
        protect_prompt: whether the prompt stayed, on top of the budget, as with ``Compression(prompt="protect")``.
    """

    budgets: tuple[int, ...]
    interval: int
    protect_prompt: bool = False

    def __post_init__(self) -> None:
        if not self.budgets or list(self.budgets) != sorted(set(self.budgets)) or self.budgets[0] < 1:
            raise ValueError(f"budgets of miss curves must be positive and ascending, got {list(self.budgets)}")
        if self.interval < 1:
            raise ValueError(f"interval must be at least 1, got {self.interval}")


def check_rhos(rhos: Sequence[float]) -> None:
    """Validate shares of attention mass; raises ``ValueError``."""
    if not rhos or list(rhos) != sorted(set(rhos)) or not all(0 < rho <= 1 for rho in rhos):
        raise ValueError(f"rhos must be ascending shares in (0, 1], got {list(rhos)}")
