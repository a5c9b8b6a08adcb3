"""StreamingLLM: attention sinks and the newest tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from reasonalloc.policies.scoring.scorer import Observation, Scorer, register_scorer


@register_scorer("streaming")
@dataclass(frozen=True)
class StreamingLLM(Scorer):
    """StreamingLLM (arXiv 2309.17453): the first ``sinks`` tokens of the sequence, then the newest.

    Positions are not renumbered: kept keys stay rotated by their place in the text.

    Attributes:
        sinks: first tokens that stay.

    Raises:
        ValueError: negative sinks, when constructed.
    """

    sinks: int = 4

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise ValueError(f"sinks must not be negative, got {self.sinks}")

    def score(self, seen: Observation) -> Float[Tensor, "batch heads tokens"]:
        """The position, sinks above all."""
        positions = seen.tokens.positions
        return positions.float().masked_fill(positions < self.sinks, torch.finfo(torch.float32).max)
