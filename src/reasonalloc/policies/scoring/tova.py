"""TOVA: what the last query looks at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from reasonalloc.policies.scoring.scorer import Observation, Scorer, register_scorer
from reasonalloc.policies.scoring.window_attention import query_logits, softmax_over


@register_scorer("tova")
@dataclass(frozen=True)
class TOVA(Scorer):
    """TOVA (arXiv 2401.06104): the last query's attention, averaged over all heads; no tokens are forced.

    All heads of a layer score a token alike, so with equal budgets they keep one token set. Where budgets differ
    and a token is missing in some heads, the average is over the heads that hold it [ours].
    """

    window = 0
    observed_queries = 1

    def score(self, seen: Observation) -> Float[Tensor, "batch heads tokens"]:
        """Attention of the newest query, averaged over the layer's heads token by token."""
        tokens = seen.tokens
        weights = softmax_over(query_logits(seen)[..., -1, :], tokens.valid[:, :, None]).mean(2)
        at, order = tokens.positions.masked_fill(~tokens.valid, -1).flatten(1).sort(1)
        new = torch.cat([torch.zeros_like(at[:, :1]), (at[:, 1:] != at[:, :-1]).long()], 1)
        token = torch.empty_like(order).scatter_(1, order, new.cumsum(1))  # which of the layer's tokens each entry is
        total = torch.zeros_like(weights.flatten(1)).scatter_add_(1, token, weights.flatten(1))
        held = torch.zeros_like(total).scatter_add_(1, token, tokens.valid.flatten(1).to(total.dtype))
        return (total / held.clamp(min=1)).gather(1, token).reshape(weights.shape)
