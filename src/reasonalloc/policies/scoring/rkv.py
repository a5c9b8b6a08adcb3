"""R-KV: importance against redundancy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reasonalloc.policies.scoring.scorer import Observation, Scorer, register_scorer
from reasonalloc.policies.scoring.tokens import LayerTokens
from reasonalloc.policies.scoring.window_attention import (
    at_least_float32,
    check_kernel,
    kernel_keys,
    pooled_importance,
)

# Never n x n; on a CPU what fits its caches.
_BLOCK_ENTRIES = {"cpu": 1 << 19}
_BLOCK_ENTRIES_ELSEWHERE = 1 << 26
NEWEST = 96  # keys that are looked through first: most keys of a model have a near duplicate among them


def block_entries(device: torch.device) -> int:
    """Entries of the similarity matrix that ``RKV`` holds at once on a device, twice: 4 bytes each."""
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
        kernel: width of the max pooling of importance, in tokens; odd.
        per_token: multiply a head's scores by its number of tokens [ours]. Redundancy is a softmax over a head's
            own length, about 1/n each, so unequal heads are not on one scale; the order inside a head does not
            change. False is the paper's literal score.

    Raises:
        ValueError: a weight or a threshold outside of [0, 1], or a kernel that is even or below 1, when constructed.

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
        if (ragged := kernel_keys(seen)) is not None:
            from reasonalloc.kernels.rkv import rkv_scores

            tokens = seen.tokens
            return rkv_scores(
                ragged.keys, ragged.starts, tokens.lengths, tokens.width, seen.queries, seen.real_queries, seen.window,
                seen.scaling, self.weight, self.threshold, self.kernel, self.per_token,
            )  # fmt: skip
        score = self.weight * pooled_importance(seen, self.kernel)
        if self.weight < 1:
            score = score - (1 - self.weight) * redundancy(seen.tokens, self.threshold)
        return score * seen.tokens.lengths[..., None] if self.per_token else score


def redundancy(tokens: LayerTokens, threshold: float) -> Float[Tensor, "batch heads tokens"]:
    """Softmax over a head's tokens of the column means of its key similarity matrix; see ``RKV``."""
    valid = tokens.valid
    counted = counted_similarity if tokens.device.type == "cpu" else counted_over_all_pairs
    total = counted(tokens.keys.flatten(0, 1), tokens.lengths.flatten(), threshold).view(valid.shape)
    mean = total / tokens.lengths[..., None].clamp(min=1)
    return mean.masked_fill(~valid, float("-inf")).softmax(-1).masked_fill(~valid, 0.0)


def counted_over_all_pairs(
    keys: Float[Tensor, "rows tokens dim"], lengths: Int[Tensor, "rows"], threshold: float
) -> Float[Tensor, "rows tokens"]:
    """As ``counted_similarity``, over all pairs of keys: the definition itself, which never waits for the device.

    The number of operations depends on the size of the similarity matrices alone, of which it holds
    ``block_entries`` at once.
    """
    _rows, n, _ = keys.shape
    index = torch.arange(n, device=keys.device)
    absent = index >= lengths[:, None]
    blocks = []
    at_once = max(1, block_entries(keys.device) // max(1, n * n))
    for some, gone in zip(keys.split(at_once), absent.split(at_once), strict=True):
        unit = at_least_float32(some)
        unit = unit / torch.linalg.vector_norm(unit, dim=-1, keepdim=True).clamp_min(1e-8)
        unit = unit.masked_fill(gone[..., None], 0.0)
        similarity = unit @ unit.transpose(-1, -2)
        similarity.diagonal(dim1=-2, dim2=-1).zero_()
        # The last column with a near duplicate of each row's key, one behind the end where there is none.
        newest = ((similarity > threshold) * (index + 1)).amax(-1)
        found = newest > 0
        newest = (newest - 1).clamp(min=0)
        spares = similarity.gather(-1, newest[..., None]).squeeze(-1).masked_fill(~found, 0.0)
        spared = torch.zeros_like(spares).scatter_add_(-1, newest, spares)
        blocks.append((similarity.sum(-2) - spared).masked_fill(gone, 0.0))
    return torch.cat(blocks)


def counted_similarity(
    keys: Float[Tensor, "rows tokens dim"], lengths: Int[Tensor, "rows"], threshold: float
) -> Float[Tensor, "rows tokens"]:
    """Per token, its similarities with the others, but for those that spare it as their newest near duplicate.

    Args:
        keys: anything at and past ``lengths``.
        lengths: tokens per row.
        threshold: cosine above which two keys are near duplicates, not negative.

    Returns:
        In float32, or float64 for such keys; 0 at and past ``lengths``.

    Made for a CPU: few keys need to be compared with all others, and what is compared fits the processor's caches.
    ``counted_over_all_pairs`` says the same in a few lines.
    """
    flat, width, entries = keys.flatten(0, 1), keys.shape[1], block_entries(keys.device)
    counted = at_least_float32(keys[:0]).new_zeros(keys.shape[:2])
    ascending, order = lengths.sort()
    held = ascending.tolist()
    for stretch in _alike(held):
        n = held[stretch.stop - 1]
        # Whole rows first: a product of few queries with many keys reads every key for little work.
        for rows in order[stretch].split(max(1, entries // max(1, n * NEWEST))):
            # Where the token of each age lies, and, being its own inverse, the age of the token at each place.
            turned = lengths[rows, None] - 1 - torch.arange(n, device=keys.device)
            absent, turned = turned < 0, turned.clamp(min=0)
            newest_first = at_least_float32(_pick(flat, turned + width * rows[:, None]))
            newest_first /= torch.linalg.vector_norm(newest_first, dim=-1, keepdim=True).clamp_min_(1e-8)
            newest_first.masked_fill_(absent[..., None], 0.0)
            # A column's sum over all rows is one dot product with the sum of all keys; only what is spared needs pairs.
            total = (newest_first @ newest_first.sum(1)[..., None]).squeeze(-1)
            total -= torch.linalg.vector_norm(newest_first, dim=-1).square_()
            total -= _spared(newest_first, absent, threshold, entries)
            counted[rows, :n] = total.gather(1, turned).masked_fill_(absent, 0.0)
    return counted


def _pick(flat: Float[Tensor, "all dim"], index: Int[Tensor, "rows some"]) -> Float[Tensor, "rows some dim"]:
    """Whole keys, a copy: faster than a gather of their channels."""
    return flat.index_select(0, index.flatten()).view(*index.shape, flat.shape[1])


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


def _spared(
    keys: Float[Tensor, "rows tokens dim"], absent: Bool[Tensor, "rows tokens"], threshold: float, entries: int
) -> Float[Tensor, "rows tokens"]:
    """Per token, the similarities that spare it: it is the newest near duplicate of the tokens that have them.

    Rows are of about one length, their newest tokens come first. Every token asks the newest keys; those that find
    no near duplicate there ask the next newest, and so on, in blocks of ``entries``.
    """
    count, n, _ = keys.shape
    spared = keys.new_zeros(count, n)
    flat, first_of_row = keys.flatten(0, 1), n * torch.arange(count, device=keys.device)[:, None]
    at_once = max(1, entries // (count * NEWEST))
    for begin in range(0, n, at_once):
        queries, settled = keys[:, begin : begin + at_once], absent[:, begin : begin + at_once]
        asking = torch.arange(begin, begin + queries.shape[1], device=keys.device).expand(count, -1)
        first, last = 0, min(n, NEWEST)
        while first < n:
            at, similarity = _newest_similar(queries, keys[:, first:last], asking - first, threshold)
            spared.scatter_add_(-1, first + at, similarity)
            settled = settled | (similarity > 0)
            left = int((~settled).sum(-1).max())
            if not left or last == n:
                break
            rest = settled.to(torch.uint8).argsort(dim=-1, stable=True)[:, :left]
            asking, settled = asking.gather(1, rest), settled.gather(1, rest)
            queries = _pick(flat, first_of_row + asking).masked_fill_(settled[..., None], 0.0)  # they ask no more
            first, last = last, min(n, last + max(NEWEST, entries // (count * left)))
    return spared


def _newest_similar(
    queries: Float[Tensor, "rows queries dim"],
    keys: Float[Tensor, "rows some dim"],
    itself: Int[Tensor, "rows queries"],
    threshold: float,
) -> tuple[Int[Tensor, "rows queries"], Float[Tensor, "rows queries"]]:
    """The first of the keys that each query is similar to, and how similar; 0.0 if to none.

    ``itself``: which of the keys the query is, if it is among them.
    """
    similarity, last = queries @ keys.transpose(-1, -2), keys.shape[1] - 1
    is_here, itself = (itself >= 0) & (itself <= last), itself.clamp(0, last)[..., None]
    similarity.scatter_(-1, itself, similarity.gather(-1, itself).masked_fill_(is_here[..., None], 0.0))
    # Reading and writing memory is most of it: as numbers, in one buffer, this is far faster than argmax of booleans.
    ranks = torch.arange(last + 1, 0, -1, device=keys.device, dtype=keys.dtype)
    best = torch.gt(similarity, threshold, out=torch.empty_like(similarity)).mul_(ranks).amax(-1)
    at = (last + 1 - best).long().clamp_(max=last)
    return at, similarity.gather(-1, at[..., None]).squeeze(-1).masked_fill_(best == 0, 0.0)
