"""Random eviction: the control that every scorer must beat."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from reasonalloc.policies.scoring.scorer import Observation, Scorer, register_scorer


@register_scorer("random")
@dataclass(frozen=True)
class Random(Scorer):
    """Uniformly random scores, drawn anew in every round (the seed is ``Compression.seed``)."""

    def score(self, seen: Observation) -> Float[Tensor, "batch heads tokens"]:
        """Independent uniform numbers."""
        return seen.noise.uniform(seen.tokens.positions)
