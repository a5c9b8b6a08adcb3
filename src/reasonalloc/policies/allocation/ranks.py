"""Head budgets where several devices hold a layer's heads (tensor parallelism)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from reasonalloc.policies.allocation.apportion import apportion
from reasonalloc.policies.allocation.heads import HeadAllocator, HeadSplit
from reasonalloc.policies.allocation.profile import DemandProfile
from reasonalloc.policies.allocation.shape import ModelShape

# This rank's tensor to those of all ranks, one behind the other along the first dimension, the same on every rank.
Gather = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class GatheredHeads(HeadAllocator):
    """A split over all ranks' heads, of which each rank takes what its own memory holds.

    Without it every rank judges its heads among themselves. With it a head's demand is told by one threshold over the
    whole layer, at the price of gathering the layer's scores at each routing. What it cannot do is move memory between
    ranks: a rank's total is fixed, and its heads share it in proportion to their budgets in the split over all.

    Attributes:
        inner: splits the layer's whole total over the heads of all ranks.
        gather: all ranks' tensors, stacked.
        rank: which of them is this one.
    """

    inner: HeadAllocator
    gather: Gather
    rank: int

    def for_layer(
        self, layer: int, shape: ModelShape, budget: int, window: int, profile: DemandProfile | None
    ) -> HeadAllocator:
        """The same, with the layer's own ``inner``."""
        return replace(self, inner=self.inner.for_layer(layer, shape, budget, window, profile))

    def for_layers(
        self, layers: Sequence[int], shape: ModelShape, budget: int, window: int, profile: DemandProfile | None
    ) -> HeadAllocator:
        """The same, with the layers' own ``inner``: one gathering for all of them."""
        return replace(self, inner=self.inner.for_layers(layers, shape, budget, window, profile))

    def allocate(
        self,
        scores: Float[Tensor, "batch heads tokens"],
        lengths: Int[Tensor, "batch heads"],
        total: Int[Tensor, "batch"],
        least: int | Int[Tensor, "batch 1"],
    ) -> HeadSplit:
        """Budgets of this rank's heads; they sum to ``total``, as ever."""
        widest = int(self._gather_whole(torch.tensor([scores.shape[-1]], device=scores.device)).max())
        scores = F.pad(scores, (0, widest - scores.shape[-1]), value=float("-inf"))
        every = self.inner.allocate(
            _side_by_side(self.gather(scores[None])),
            _side_by_side(self._gather_whole(lengths[None])),
            self._gather_whole(total[None]).sum(0),
            least,
        )
        heads = lengths.shape[1]
        wish = every.budgets[:, self.rank * heads : (self.rank + 1) * heads]
        return HeadSplit(within_rank(wish, lengths, total, least), every.threshold)

    def _gather_whole(self, x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """Numbers of tokens travel as float32, exact below 2**24: not every engine gathers integers."""
        return self.gather(x.to(torch.float32)).to(x.dtype)


def within_rank(
    wish: Int[Tensor, "batch heads"],
    lengths: Int[Tensor, "batch heads"],
    total: Int[Tensor, "batch"],
    least: int | Int[Tensor, "batch 1"],
) -> Int[Tensor, "batch heads"]:
    """A rank's budgets in a split over all heads, scaled to the ``total`` that its own memory holds."""
    held = lengths.to(torch.float64)
    return apportion(wish.to(torch.float64), total, held.clamp(max=least), held)


def _side_by_side(stacked: Tensor) -> Tensor:
    """``[ranks, batch, heads, ...]`` to ``[batch, ranks * heads, ...]``."""
    return stacked.transpose(0, 1).flatten(1, 2)
