"""Selection: from scores and head budgets to the tokens that stay. Moving them is the storage's part."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reasonalloc.kernels import launch
from reasonalloc.policies.allocation import HeadAllocator, HeadSplit
from reasonalloc.policies.allocation.apportion import apportion

_LARGEST = torch.finfo(torch.float32).max / 2


@dataclass(frozen=True)
class Candidates:
    """Tokens of some rows as the routing sees them.

    Attributes:
        scores: float32; +inf for the window, -inf for what is absent or protected on top of the budget.
        lengths: tokens per head that count against the budget.
        protected: leading tokens of each head that stay on top of the budget.
    """

    scores: Float[Tensor, "batch heads tokens"]
    lengths: Int[Tensor, "batch heads"]
    protected: Int[Tensor, "batch"]

    def part(self, rows: slice, width: int) -> Candidates:
        """Some rows of the batch, padded to ``width`` tokens."""
        return Candidates(self.scores[rows, :, :width], self.lengths[rows], self.protected[rows])


def rank_candidates(
    scores: Float[Tensor, "batch heads tokens"],
    valid: Bool[Tensor, "batch heads tokens"],
    newest: Bool[Tensor, "batch heads tokens"],
    protected: Int[Tensor, "batch"],
) -> Candidates:
    """Put the scorer's numbers in the form that allocators and ``select`` read."""
    index = torch.arange(scores.shape[-1], device=scores.device)
    outside = index < protected[:, None, None]
    scores = scores.float().nan_to_num(nan=-_LARGEST, posinf=_LARGEST, neginf=-_LARGEST).clamp(-_LARGEST, _LARGEST)
    scores = scores.masked_fill(newest, float("inf")).masked_fill(~valid | outside, float("-inf"))
    return Candidates(scores, (valid & ~outside).sum(-1), protected)


def rank(
    scores: Float[Tensor, "batch heads tokens"],
    lengths: Int[Tensor, "batch heads"],
    window: int,
    protected: Int[Tensor, "batch"],
    pinned: Int[Tensor, "batch"] | None = None,
) -> tuple[Candidates, Bool[Tensor, ""]]:
    """``rank_candidates`` of left-aligned tokens whose newest ``window`` are kept; and whether a score is NaN.

    So are each row's first ``pinned`` tokens, where there are any.
    """
    if launch.serve(scores.device):
        from reasonalloc.kernels import ranking

        ranked, is_nan = ranking.rank(scores, lengths, protected, window)
        candidates = Candidates(ranked, (lengths - protected[:, None]).clamp(min=0), protected)
    else:
        index = torch.arange(scores.shape[-1], device=scores.device)
        valid = index < lengths[..., None]
        newest = valid & (index >= lengths[..., None] - window)
        candidates, is_nan = rank_candidates(scores, valid, newest, protected), (scores.isnan() & valid).any()
    if pinned is None:
        return candidates, is_nan
    index = torch.arange(scores.shape[-1], device=scores.device)
    first = (index < pinned[:, None, None]) & (index < lengths[..., None])
    return replace(candidates, scores=candidates.scores.masked_fill(first, float("inf"))), is_nan


def pin(
    candidates: Candidates,
    index: Int[Tensor, "batch heads tokens"],
    kept: Int[Tensor, "batch heads"],
    pinned: Int[Tensor, "batch"],
) -> Int[Tensor, "batch heads tokens"]:
    """The tokens that stay, each head's best-scored ``pinned`` ones first, the window's not asked; each part in order.

    Args:
        candidates: tokens of prompts that have just ended.
        index, kept: what stays of them, as ``select`` says.
        pinned: of each row.
    """
    scores = candidates.scores
    asked = scores.masked_fill(torch.isposinf(scores), float("-inf"))
    best = asked.argsort(dim=-1, descending=True, stable=True)
    width = index.shape[-1]
    at = torch.arange(width, device=index.device)
    rank_of = torch.empty_like(best).scatter_(-1, best, at.expand_as(best))
    chosen = rank_of.gather(-1, index.long()) < pinned[:, None, None]
    place = torch.where(chosen, at, at + width).masked_fill(at >= kept[..., None], 2 * width)
    return index.gather(-1, place.argsort(-1))


def route_heads(
    allocator: HeadAllocator, candidates: Candidates, total: Int[Tensor, "batch"], least: int | Int[Tensor, "batch 1"]
) -> HeadSplit:
    """Head budgets that sum to ``total`` for every sequence, also where the layer is not full yet.

    ``least``: as for ``HeadAllocator.allocate``.

    A sequence that holds no more than ``total`` keeps everything; what it does not use is shared out evenly.
    """
    lengths = candidates.lengths
    over = lengths.sum(-1) > total
    # Rows that fit are given a solvable problem instead (their own length); its answer is then not used.
    target = torch.minimum(total, lengths.sum(-1))
    split = allocator.allocate(candidates.scores, lengths, target, least)
    spare = (total - lengths.sum(-1)).clamp(min=0)
    room = torch.ones_like(lengths, dtype=torch.float64)
    even = lengths + apportion(room, spare, torch.zeros_like(room), room * spare[:, None])
    return HeadSplit(torch.where(over[:, None], split.budgets, even), split.threshold)


def kept_of(candidates: Candidates, budgets: Int[Tensor, "batch heads"]) -> Int[Tensor, "batch heads"]:
    """How many tokens each head keeps: protected ones, and of the others as many as the budget."""
    return torch.minimum(budgets, candidates.lengths) + candidates.protected[:, None]


def select(
    candidates: Candidates, budgets: Int[Tensor, "batch heads"], by_score: bool
) -> tuple[Int[Tensor, "batch heads tokens"], Int[Tensor, "batch heads"]]:
    """Indices of the tokens that stay, and how many per head.

    Entries of the indices at or past those numbers mean nothing. Each head keeps its protected tokens, its window, and
    its best-scored tokens up to the budget; of equal scores the earlier stored token wins. Survivors keep their order,
    or with ``by_score`` stand in descending order of score behind the protected and before the window.
    """
    scores = candidates.scores
    if not by_score and launch.serve(scores.device):
        from reasonalloc.kernels import ranking

        kept = kept_of(candidates, budgets)
        return ranking.select(scores, candidates.protected, kept), kept
    index = torch.arange(scores.shape[-1], device=scores.device).expand_as(scores)
    outside = index < candidates.protected[:, None, None]
    kept = kept_of(candidates, budgets)
    # Protected tokens first: inside a head they and the window rank above all scores.
    order = scores.masked_fill(outside, float("inf")).argsort(dim=-1, descending=True, stable=True)
    if by_score:
        order = _window_last(order, scores, candidates.protected, kept)
    else:
        order = order.masked_fill(index >= kept[..., None], scores.shape[-1]).sort(-1).values
    return order.clamp(max=max(scores.shape[-1] - 1, 0)), kept


def _window_last(order: Tensor, scores: Tensor, protected: Tensor, kept: Tensor) -> Tensor:
    """Move the window, which ranks right behind the protected tokens, to the end of the survivors."""
    at = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    forced = torch.isposinf(scores).sum(-1, keepdim=True)
    is_window = (at >= protected[:, None, None]) & (at < protected[:, None, None] + forced)
    place = torch.where(is_window, at + order.shape[-1], at).masked_fill(at >= kept[..., None], 3 * order.shape[-1])
    return order.gather(-1, place.argsort(-1))
