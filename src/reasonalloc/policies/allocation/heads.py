"""Head allocators: how a layer's total is split over its key/value heads, per sequence, at every routing.

All work on whole batches on the device, and all return budgets that sum to the layer's total exactly.
Scores arrive *pooled-ready*: a higher score means "keep", on one scale for all heads of the layer (scorers see to
that); tokens of the recent window have score +inf, absent tokens -inf.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reasonalloc.kernels import launch
from reasonalloc.policies.allocation.apportion import apportion, check_operator, smooth
from reasonalloc.policies.allocation.demand import descending
from reasonalloc.policies.allocation.profile import DemandProfile
from reasonalloc.policies.allocation.shape import ModelShape
from reasonalloc.policies.registry import Registry


@dataclass(frozen=True)
class HeadSplit:
    """Budgets per head, and the pooled threshold that they came from where there is one.

    Attributes:
        budgets: ``[batch, heads]`` int64, tokens that each head keeps, summing to the layer's total.
        threshold: ``[batch]``, the least score that counted as demand; None for allocators without one.
    """

    budgets: Int[Tensor, "batch heads"]
    threshold: Float[Tensor, "batch"] | None = None


class HeadAllocator(ABC):
    """Splits a layer's tokens over its heads. Implementations are frozen dataclasses of their settings.

    Attributes:
        needs_profile: whether a cache without a demand profile is refused.
    """

    needs_profile: bool = False

    @property
    def calibrate_options(self) -> str:
        """What `reasonalloc calibrate` must be told beside the model, for a profile that serves this allocator."""
        return ""

    def for_layer(
        self, layer: int, shape: ModelShape, budget: int, window: int, profile: DemandProfile | None
    ) -> HeadAllocator:
        """The allocator of one layer: itself, unless layers are treated differently.

        Args:
            layer: index of the layer.
            shape: the model's attention shape.
            budget: tokens per key/value head, averaged over the model; includes the window.
            window: newest tokens that every head keeps.
            profile: the model's demand profile, or None.
        """
        return self

    def for_layers(
        self, layers: Sequence[int], shape: ModelShape, budget: int, window: int, profile: DemandProfile | None
    ) -> HeadAllocator:
        """The allocator of several layers in one batch, layer after layer, each with as many rows.

        Entry i of its batch belongs to ``layers[i // rows]``, with ``rows = batch / len(layers)``. Its budgets are
        those of ``for_layer`` layer by layer; where that is one object for all layers, it is the one.

        Args:
            layers: indices of the layers, at least one.
            shape: the model's attention shape.
            budget: tokens per key/value head, averaged over the model; includes the window.
            window: newest tokens that every head keeps.
            profile: the model's demand profile, or None.
        """
        own = tuple(self.for_layer(layer, shape, budget, window, profile) for layer in layers)
        return own[0] if all(allocator is own[0] for allocator in own) else LayeredHeads(own)

    @abstractmethod
    def allocate(
        self,
        scores: Float[Tensor, "batch heads tokens"],
        lengths: Int[Tensor, "batch heads"],
        total: Int[Tensor, "batch"],
        least: int | Int[Tensor, "batch 1"],
    ) -> HeadSplit:
        """Split ``total`` over the heads of each sequence.

        Args:
            scores: utility of each token, higher is better, on one scale for all heads of the layer. Tokens of the
                window have +inf, absent ones -inf.
            lengths: tokens that each head holds; no head is given more than it holds.
            total: the layer's budget per sequence; ``lengths.sum(-1) > total`` is assumed.
            least: tokens that every head keeps whatever their score, of those that it holds: the window, and the pinned
                ones of a prompt, whose number differs by sequence.

        Returns:
            Budgets that sum to ``total`` in every sequence.
        """


@dataclass(frozen=True)
class LayeredHeads(HeadAllocator):
    """Several layers in one batch, each split by an allocator of its own; see ``HeadAllocator.for_layers``."""

    own: tuple[HeadAllocator, ...]

    def allocate(
        self,
        scores: Float[Tensor, "batch heads tokens"],
        lengths: Int[Tensor, "batch heads"],
        total: Int[Tensor, "batch"],
        least: int | Int[Tensor, "batch 1"],
    ) -> HeadSplit:
        """Each layer's split of its rows. There are thresholds where all layers have them."""
        check_layers(len(lengths), len(self.own))
        rows = len(lengths) // len(self.own)
        splits = []
        for i, allocator in enumerate(self.own):
            own = slice(i * rows, (i + 1) * rows)
            splits.append(allocator.allocate(scores[own], lengths[own], total[own], of_rows(least, own)))
        thresholds = [split.threshold for split in splits if split.threshold is not None]
        return HeadSplit(
            torch.cat([split.budgets for split in splits]),
            torch.cat(thresholds) if len(thresholds) == len(splits) else None,
        )


def check_layers(batch: int, layers: int) -> None:
    """Raise ``ValueError`` where a batch does not hold as many rows of each layer."""
    if batch % layers:
        raise ValueError(f"a batch of {batch} entries cannot be of {layers} layers, each with as many rows")


HEAD_ALLOCATORS: Registry[HeadAllocator] = Registry("head allocator", "reasonalloc.heads", HeadAllocator)
"""Every known head allocator by name: ``HEAD_ALLOCATORS.names()``, ``HEAD_ALLOCATORS.create("threshold")``."""
register_head_allocator = HEAD_ALLOCATORS.register
"""Class decorator that enters a ``HeadAllocator`` under a name: ``@register_head_allocator("mine")``.

Raises ``ValueError`` for a name that another class has, and for a class that is no ``HeadAllocator``.
"""


def pooled_counts(
    scores: Float[Tensor, "batch heads tokens"], k: Int[Tensor, "batch"]
) -> tuple[Int[Tensor, "batch heads"], Float[Tensor, "batch"]]:
    """Per head, how many of its tokens reach the layer's ``k``-th largest score, and that score."""
    if scores.dtype == torch.float32 and launch.serve(scores.device):
        from reasonalloc.kernels import ranking

        return ranking.pooled_counts(scores, k)
    ranked = descending(scores.flatten(1))
    threshold = ranked.gather(-1, (k[:, None] - 1).clamp(0, ranked.shape[-1] - 1)).squeeze(-1)
    return (scores >= threshold[:, None, None]).sum(-1), threshold


def of_rows(least: int | Int[Tensor, "batch 1"], rows: slice) -> int | Int[Tensor, "some 1"]:
    """What ``HeadAllocator.allocate`` is told of some sequences alone."""
    return least if isinstance(least, int) else least[rows]


def share_out(
    weights: Float[Tensor, "batch heads"],
    lengths: Int[Tensor, "batch heads"],
    total: Int[Tensor, "batch"],
    least: int | Int[Tensor, "batch 1"],
) -> HeadSplit:
    """Shares in proportion to ``weights``: every head what it keeps anyway, none more than it holds."""
    held = lengths.to(torch.float64)
    return HeadSplit(apportion(weights, total, held.clamp(max=least), held))


@HEAD_ALLOCATORS.register("uniform")
@dataclass(frozen=True)
class UniformHeads(HeadAllocator):
    """Every head of a layer the same."""

    def allocate(
        self,
        scores: Float[Tensor, "batch heads tokens"],
        lengths: Int[Tensor, "batch heads"],
        total: Int[Tensor, "batch"],
        least: int | Int[Tensor, "batch 1"],
    ) -> HeadSplit:
        """Equal shares; a head that holds less than its share leaves the rest to the others."""
        return share_out(torch.ones_like(lengths), lengths, total, least)


@HEAD_ALLOCATORS.register("threshold")
@dataclass(frozen=True)
class ThresholdHeads(HeadAllocator):
    """ReasonAlloc's global threshold (section 4, Algorithm 1).

    A head's raw demand is the number of its tokens among the layer's ``total`` best scores (the window counts:
    a budget includes it); R(.) with exponent beta and bounds [lower, upper] x mean makes budgets of the demands.
    Ours: the floor never falls under the window, and no head is given more tokens than it holds.

    Attributes:
        exponent: the paper's beta, the power of R(.).
        lower: least share of a head, as a multiple of the mean, in [0, 1].
        upper: largest share, likewise, at least 1.

    Raises:
        ValueError: a setting out of range, when constructed.
    """

    exponent: float = 0.5
    lower: float = 0.25
    upper: float = 2.0

    def __post_init__(self) -> None:
        check_operator(self.exponent, self.lower, self.upper)

    def allocate(
        self,
        scores: Float[Tensor, "batch heads tokens"],
        lengths: Int[Tensor, "batch heads"],
        total: Int[Tensor, "batch"],
        least: int | Int[Tensor, "batch 1"],
    ) -> HeadSplit:
        """R(counts above the threshold; total)."""
        demand, threshold = pooled_counts(scores, total)
        mean = (total.to(torch.float64) / lengths.shape[-1])[:, None]
        held = lengths.to(torch.float64)
        low = torch.minimum((self.lower * mean).expand_as(held).clamp(min=least), held)
        high = torch.maximum(torch.minimum(self.upper * mean, held), low)
        # A head far over its upper bound (after the layer's total shrank) must not make the split infeasible.
        high = high.where(high.sum(-1, keepdim=True) >= total[:, None], held)
        budgets = apportion(smooth(demand, self.exponent), total, low, high)
        return HeadSplit(budgets, threshold)


@HEAD_ALLOCATORS.register("adakv")
@dataclass(frozen=True)
class AdaKVHeads(HeadAllocator):
    """AdaKV (arXiv 2407.11550): a head's share of the layer's top scores, blended with an equal safeguard share.

    Deviation: the original rounds each head by itself and misses the total; ours is exact.

    Attributes:
        safeguard: the equal share's part, in [0, 1].

    Raises:
        ValueError: a safeguard out of range, when constructed.
    """

    safeguard: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.safeguard <= 1:
            raise ValueError(f"safeguard must be in [0, 1], got {self.safeguard}")

    def allocate(
        self,
        scores: Float[Tensor, "batch heads tokens"],
        lengths: Int[Tensor, "batch heads"],
        total: Int[Tensor, "batch"],
        least: int | Int[Tensor, "batch 1"],
    ) -> HeadSplit:
        """Window, plus ``(1 - safeguard) * count + safeguard * equal share`` of what the windows leave."""
        counts, threshold = pooled_counts(scores, total)
        recent = lengths.clamp(max=least)
        rest = total - recent.sum(-1)
        free = (lengths - recent).to(torch.float64)
        own, equal = (counts - recent).to(torch.float64), rest.to(torch.float64)[:, None] / lengths.shape[-1]
        wish = (1 - self.safeguard) * own + self.safeguard * equal
        return HeadSplit(recent + apportion(wish, rest, torch.zeros_like(free), free), threshold)
