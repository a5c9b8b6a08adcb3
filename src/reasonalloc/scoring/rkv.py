"""R-KV: importance against redundancy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from reasonalloc.scoring.scorer import Observation, Scorer, register_scorer
from reasonalloc.scoring.window_attention import at_least_float32, check_kernel, pooled_importance
from reasonalloc.storage.tokens import LayerTokens

# Never n x n; on a CPU what fits its caches.
_BLOCK_ENTRIES = {"cpu": 1 << 19}
_BLOCK_ENTRIES_ELSEWHERE = 1 << 26


def block_entries(device: torch.device) -> int:
    """Entries of the similarity matrix that ``RKV`` holds at once on a device: 4 bytes each."""
    return _BLOCK_ENTRIES.get(device.type, _BLOCK_ENTRIES_ELSEWHERE)


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
    keys = F.normalize(at_least_float32(tokens.keys), dim=-1, eps=1e-8).masked_fill_(~valid[..., None], 0.0)
    # A column's sum over all rows is one dot product with the sum of all keys; only what rows spare needs pairs.
    total = (keys @ keys.sum(2)[..., None]).squeeze(-1) - torch.linalg.vector_norm(keys, dim=-1).square()
    total = total - spared_similarity(keys.flatten(0, 1), tokens.lengths.flatten(), threshold).view_as(total)
    mean = total / tokens.lengths[..., None].clamp(min=1)
    return mean.masked_fill(~valid, float("-inf")).softmax(-1).masked_fill(~valid, 0.0)


def spared_similarity(
    keys: Float[Tensor, "rows tokens dim"], lengths: Int[Tensor, "rows"], threshold: float
) -> Float[Tensor, "rows tokens"]:
    """Per token, the similarities that others do not count against it because it is their newest near duplicate.

    Args:
        keys: normalised; zero at and past ``lengths``.
        lengths: tokens per row.
        threshold: cosine above which two keys are near duplicates.
    """
    spared, entries = keys.new_zeros(keys.shape[:2]), block_entries(keys.device)
    ascending, order = lengths.sort()
    held = ascending.tolist()
    for stretch in _alike(held):
        n = held[stretch.stop - 1]
        # Whole rows first: a product of few queries with many keys reads every key for little work.
        for rows in order[stretch].split(max(1, entries // max(1, n * n))):
            spared[rows, :n] = _spared(keys[rows, :n], threshold, max(1, entries // max(1, len(rows) * n)))
    return spared


def _alike(lengths: list[int]) -> Iterator[slice]:
    """Cut ascending lengths into stretches that differ by a quarter at most: little padding, few stretches."""
    first = 0
    if not lengths:
        return
    for at, length in enumerate(lengths):
        if length > 1.25 * lengths[first]:
            yield slice(first, at)
            first = at
    yield slice(first, len(lengths))


def _spared(keys: Float[Tensor, "rows tokens dim"], threshold: float, block: int) -> Float[Tensor, "rows tokens"]:
    """``spared_similarity`` of rows of about one length, ``block`` queries of each at a time."""
    count, n, _ = keys.shape
    spared = keys.new_zeros(count, n)
    columns = torch.arange(1, n + 1, device=keys.device, dtype=keys.dtype)
    for first in range(0, n, block):
        queries = keys[:, first : first + block]
        similarity = queries @ keys.transpose(-1, -2)
        similarity.diagonal(first, 1, 2).zero_()
        # In place, because reading and writing memory is most of it; what was overwritten is one dot product each.
        newest = similarity.gt_(threshold).mul_(columns).amax(-1).long() - 1
        at = newest.clamp(min=0)
        value = (queries * keys.take_along_dim(at[..., None], 1)).sum(-1).masked_fill(newest < 0, 0.0)
        spared.scatter_add_(-1, at, value)
    return spared
