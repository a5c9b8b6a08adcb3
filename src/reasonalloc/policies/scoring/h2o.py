"""H2O: heavy hitters."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from reasonalloc.policies.scoring.scorer import Observation, Scorer, register_scorer


@register_scorer("h2o")
@dataclass(frozen=True)
class H2O(Scorer):
    """H2O (arXiv 2306.14048): attention accumulated over all queries since the token arrived.

    The sum over a group's query heads is carried through evictions. The original spends half of the budget on the
    newest tokens: the method ``h2o`` sets the window so; as a scorer alone it keeps the default window.
    """

    needs_received = True

    def score(self, seen: Observation) -> Float[Tensor, "batch heads tokens"]:
        """The accumulated attention."""
        assert seen.tokens.received is not None
        return seen.tokens.received
