"""R-KV: importance against redundancy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from reasonalloc.scoring.scorer import Observation, Scorer, register_scorer
from reasonalloc.scoring.window_attention import at_least_float32, check_kernel, pooled_importance
from reasonalloc.storage.tokens import LayerTokens

_BLOCK_ENTRIES = 1 << 24  # entries of the similarity matrix held at once: a long prompt never needs n x n memory


@register_scorer("rkv")
@dataclass(frozen=True)
class RKV(Scorer):
    """R-KV (arXiv 2505.24133): ``weight * importance - (1 - weight) * redundancy``.

    Importance is the pooled attention of the last queries; redundancy the softmax, over a head's tokens, of each
    key's mean cosine similarity with the others, where every token spares the newest key similar to it.

    Attributes:
        weight: lambda; 0.1 in the paper (its code has 0.07).
        threshold: cosine above which two keys are near duplicates.
        kernel: width of the max pooling of importance.
        per_token: multiply a head's scores by its number of tokens [ours]. Redundancy is a softmax over a head's
            own length, about 1/n each, so unequal heads are not on one scale; the order inside a head does not
            change. False is the paper's literal score.

    Deviations: a token without a near duplicate spares no key (the original spares the first token then);
    neighbours are neighbours in the text unless the cache is told to store by score.
    """

    weight: float = 0.1
    threshold: float = 0.5
    kernel: int = 7
    per_token: bool = True

    observed_queries = 8

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight must be in [0, 1], got {self.weight}")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is a cosine, in [0, 1], got {self.threshold}")
        check_kernel(self.kernel)

    def score(self, seen: Observation) -> Float[Tensor, "batch heads tokens"]:
        """``weight * I - (1 - weight) * R``, times the head's length with ``per_token``."""
        score = self.weight * pooled_importance(seen, self.kernel)
        if self.weight < 1:
            score = score - (1 - self.weight) * redundancy(seen.tokens, self.threshold)
        return score * seen.tokens.lengths[..., None] if self.per_token else score


def redundancy(tokens: LayerTokens, threshold: float) -> Float[Tensor, "batch heads tokens"]:
    """Softmax over a head's tokens of the column means of its key similarity matrix; see ``RKV``."""
    valid = tokens.valid
    keys = F.normalize(at_least_float32(tokens.keys), dim=-1, eps=1e-8).masked_fill(~valid[..., None], 0.0)
    batch, heads, n, _ = keys.shape
    total = keys.new_zeros(batch, heads, n)
    block = max(1, _BLOCK_ENTRIES // (batch * heads * n))
    for first in range(0, n, block):
        rows = torch.arange(first, min(first + block, n), device=keys.device)
        total += _similarity_sums(keys, rows, valid, threshold)
    mean = total / tokens.lengths[..., None].clamp(min=1)
    return mean.masked_fill(~valid, float("-inf")).softmax(-1).masked_fill(~valid, 0.0)


def _similarity_sums(keys: Tensor, rows: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """Sum over a block of rows of the similarity matrix, its diagonal and each row's newest duplicate left out."""
    similarity = keys[:, :, rows] @ keys.transpose(-1, -2)
    similarity[..., torch.arange(len(rows), device=rows.device), rows] = 0.0
    similar = similarity > threshold
    columns = torch.arange(1, keys.shape[2] + 1, device=rows.device, dtype=torch.int32)
    newest = (similar * columns).amax(-1, keepdim=True).long() - 1
    spared = torch.zeros_like(similar).scatter_(-1, newest.clamp(min=0), newest >= 0)
    return similarity.masked_fill(spared | ~valid[:, :, rows, None], 0.0).sum(-2)
