"""Random eviction: the control that every scorer must beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from reasonalloc.policies.scoring.scorer import Observation, Scorer, register_scorer


@register_scorer("random")
@dataclass(frozen=True)
class Random(Scorer):
    """Uniformly random scores from the cache's own generator (its seed is ``Compression.seed``)."""

    def score(self, seen: Observation) -> Float[Tensor, "batch heads tokens"]:
        """Independent uniform numbers."""
        shape, device = seen.tokens.keys.shape[:3], seen.tokens.keys.device
        return torch.rand(shape, generator=seen.generator, device=device)
