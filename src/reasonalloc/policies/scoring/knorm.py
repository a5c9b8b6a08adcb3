"""Knorm: keys of small norm first."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from reasonalloc.policies.scoring.scorer import Observation, Scorer, register_scorer
from reasonalloc.policies.scoring.window_attention import at_least_float32


@register_scorer("knorm")
@dataclass(frozen=True)
class Knorm(Scorer):
    """Keep the keys of smallest L2 norm (arXiv 2406.11430): they tend to draw the most attention.

    Norms of different heads are not on one scale; pooling them across heads is the user's own risk.
    """

    def score(self, seen: Observation) -> Float[Tensor, "batch heads tokens"]:
        """Minus the key's norm."""
        return -at_least_float32(seen.tokens.keys).norm(dim=-1)
