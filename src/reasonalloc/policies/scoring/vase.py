"""VaSE: protect large values, draw the rest at random; and its variant that looks at no query."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reasonalloc.policies.scoring.scorer import Observation, Scorer, register_scorer
from reasonalloc.policies.scoring.window_attention import (
    at_least_float32,
    attention_weights,
    average_pool,
    check_kernel,
    mean_over_queries,
)

_LARGEST = torch.finfo(torch.float32).max


@register_scorer("vase")
@dataclass(frozen=True)
class VaSE(Scorer):
    """VaSE (arXiv 2606.03928), with attention: values of large range stay, the others are drawn by attention.

    The ``protected`` share of a head's budget goes to the tokens whose values have the largest range
    (maximum - minimum over channels), the first ``sinks`` tokens before all. The rest is drawn without replacement
    with probability proportional to attention: softmax per query head over the candidates, mean over the last
    64 queries, average pooling, mean over the group. Drawing is done by the Gumbel trick: the top k of
    ``log p + Gumbel noise`` are k draws without replacement.

    Ours: candidates are the tokens outside the window; the protected share refers to the layer's mean budget.

    Attributes:
        sinks: first tokens of the text, which stay.
        protected: share of the budget for values of large range, in [0, 1].
        kernel: width of the average pooling, in tokens; odd.

    Raises:
        ValueError: a setting out of range, when constructed.
    """

    sinks: int = 4
    protected: float = 0.25
    kernel: int = 5

    window = 64
    observed_queries = 64

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise ValueError(f"sinks must not be negative, got {self.sinks}")
        if not 0 <= self.protected <= 1:
            raise ValueError(f"protected is a share of the budget, in [0, 1], got {self.protected}")
        check_kernel(self.kernel)

    def score(self, seen: Observation) -> Float[Tensor, "batch heads tokens"]:
        """Protected tokens by range, above all others; these by ``lottery``."""
        candidates = seen.tokens.valid & ~seen.tokens.newest(seen.window)
        ranges = self.value_range(seen, candidates)
        count = (self.protected * seen.budget).floor().long()
        order = ranges.argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(-1, order, seen.tokens.index.expand_as(order))
        protected = candidates & (rank < count[:, None, None])
        above = _LARGEST / 4 * (2 - rank / rank.shape[-1])  # beyond any lottery, in order of range
        return self.lottery(seen, candidates).where(~protected, above)

    def value_range(self, seen: Observation, candidates: Bool[Tensor, "batch heads tokens"]) -> Tensor:
        """Range over a value's channels, infinite for the sinks, -infinite for tokens not in question."""
        values = at_least_float32(seen.tokens.values)
        ranges = (values.amax(-1) - values.amin(-1)).float()
        ranges = ranges.masked_fill(seen.tokens.positions < self.sinks, float("inf"))
        return ranges.masked_fill(~candidates, float("-inf"))

    def lottery(self, seen: Observation, candidates: Bool[Tensor, "batch heads tokens"]) -> Tensor:
        """``log p + Gumbel noise`` of each candidate."""
        exponential = -seen.noise.uniform(seen.tokens.positions).log()
        return self.probability(seen, candidates).log() - exponential.log()

    def probability(self, seen: Observation, candidates: Bool[Tensor, "batch heads tokens"]) -> Tensor:
        """Unnormalised probability of each candidate to be drawn."""
        weights = mean_over_queries(seen, attention_weights(seen, candidates))
        return average_pool(weights, self.kernel).mean(2).float().masked_fill(~candidates, 0.0)


@register_scorer("vase-queryfree")
@dataclass(frozen=True)
class QueryFreeVaSE(Scorer):
    """VaSE's variant without queries: a random sketch of keys and values in place of attention.

    The first ``sinks`` tokens stay; the others rank by ``|k G|^2 * |v G|^2`` with a Gaussian ``G`` (dim x rank, scaled
    by 1/sqrt(rank)), drawn anew for every sequence at every eviction and the same for all its heads. As in the
    original, values of large range are not protected: that is ``VaSE``'s alone.

    Attributes:
        sinks: first tokens of the text, which stay.
        rank: columns of the sketch.

    Raises:
        ValueError: negative sinks or a rank below 1, when constructed.
    """

    sinks: int = 4
    rank: int = 20

    window = 64

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise ValueError(f"sinks must not be negative, got {self.sinks}")
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")

    def score(self, seen: Observation) -> Float[Tensor, "batch heads tokens"]:
        """The product of the sketched squared norms, sinks above all."""
        keys, values = at_least_float32(seen.tokens.keys), at_least_float32(seen.tokens.values)
        width = max(keys.shape[-1], values.shape[-1])
        sketch = seen.noise.normal(width, self.rank)[:, None].to(keys.dtype) * self.rank**-0.5
        norms = [(x @ sketch[..., : x.shape[-1], :]).square().sum(-1) for x in (keys, values)]
        return (norms[0] * norms[1]).float().masked_fill(seen.tokens.positions < self.sinks, _LARGEST)
