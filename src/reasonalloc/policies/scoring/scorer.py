"""What a token scorer is, what it may look at, and where scorers are registered."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reasonalloc.policies.registry import Registry
from reasonalloc.policies.scoring.noise import Noise
from reasonalloc.policies.scoring.tokens import LayerTokens


@dataclass(frozen=True)
class Observation:
    """All that a scorer may look at in a round. The batch holds the sequences of one layer, or of several.

    Attributes:
        tokens: the cached tokens.
        queries: the last queries after rotary embedding, oldest first, as many as the scorer asked for (fewer
            early in a sequence, see ``real_queries``); None if it asked for none.
        real_queries: which of the queries exist; False marks padding.
        scaling: factor of the attention logits, usually ``dim ** -0.5``.
        window: newest tokens of each head that are kept whatever their score.
        budget: the layer's tokens per head, averaged over heads, for each sequence.
        noise: the round's random numbers, the same however rows and layers are batched.
        generator: a source of random numbers on the tokens' device, for scorers to whom ``noise`` does not suffice:
            what it gives depends on what was drawn before.
    """

    tokens: LayerTokens
    queries: Float[Tensor, "batch query_heads queries dim"] | None
    real_queries: Bool[Tensor, "batch queries"] | None
    scaling: float
    window: int
    budget: Float[Tensor, "batch"]
    noise: Noise
    generator: torch.Generator


class Scorer(ABC):
    """Decides *which* tokens of a head are worth keeping; budgets decide how many.

    Subclass as a frozen dataclass of the method's settings, implement ``score``, and register the class:

        @reasonalloc.register_scorer("mine")
        @dataclass(frozen=True)
        class Mine(reasonalloc.Scorer):
            def score(self, seen: Observation) -> Tensor: ...

    Class attributes say what must be observed between compressions:

    Attributes:
        window: newest tokens of each head that are kept by default.
        observed_queries: how many of the last queries ``score`` reads.
        needs_received: whether ``tokens.received`` (attention since arrival) must be tracked.
    """

    window: int = 8
    observed_queries: int = 0
    needs_received: bool = False

    @abstractmethod
    def score(self, seen: Observation) -> Float[Tensor, "batch heads tokens"]:
        """Utility of each token, higher is better, float32; entries of absent tokens are ignored.

        Inside one head only the order matters. Allocators that pool the heads of a layer compare values too, so
        they should mean the same in heads of different length. Window tokens are kept anyway.
        """


SCORERS: Registry[Scorer] = Registry("token scorer", "reasonalloc.scorers", Scorer)
"""Every known scorer by name: ``SCORERS.names()``, ``SCORERS.create("rkv")``."""
register_scorer = SCORERS.register
"""Class decorator that enters a ``Scorer`` under a name: ``@register_scorer("mine")``.

Raises ``ValueError`` for a name that another class has, and for a class that is no ``Scorer``.
"""


def without_window(scorer: Any) -> tuple[Any, Any]:
    """A name with settings, but for a "window" that is no setting of the scorer, and that window; None if none."""
    if not isinstance(scorer, Mapping) or "window" not in scorer or not isinstance(scorer.get("name"), str):
        return scorer, None
    if "window" in SCORERS.settings(scorer["name"]):
        return scorer, None
    return {key: value for key, value in scorer.items() if key != "window"}, scorer["window"]
