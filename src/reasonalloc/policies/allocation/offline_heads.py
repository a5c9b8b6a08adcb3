"""Budgets of all heads of a model at once, fixed before decoding: what allocators from a profile have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from reasonalloc.policies.allocation.heads import HeadAllocator, HeadSplit, check_layers, share_out
from reasonalloc.policies.allocation.layers import LayerAllocator, no_profile
from reasonalloc.policies.allocation.profile import DemandProfile
from reasonalloc.policies.allocation.shape import ModelShape


@dataclass(frozen=True)
class OfflineBudgets(ABC):
    """Budgets of every head from the model's profile; ``OfflineLayers`` and ``OfflineHeads`` hand them out.

    Attributes:
        floor: least tokens of a head, as a share of the mean budget; never below the window and one token more.
    """

    floor: float = 0.125

    needs_profile = True

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor must be in [0, 1], got {self.floor}")

    def budgets(
        self, shape: ModelShape, budget: int, window: int, profile: DemandProfile | None
    ) -> Int[np.ndarray[Any, Any], "layers kv_heads"]:
        """Tokens of every head, summing to ``layers * kv_heads * budget``.

        Raises ``ValueError`` without a profile, or where it does not hold what is needed.
        """
        if profile is None and self.needs_profile:
            raise ValueError(no_profile(self))
        return self.split(shape, budget, window, profile)  # type: ignore[arg-type]  # None where none is needed

    @property
    @abstractmethod
    def calibrate_options(self) -> str:
        """As for ``LayerAllocator`` and ``HeadAllocator``."""

    @abstractmethod
    def split(
        self, shape: ModelShape, budget: int, window: int, profile: DemandProfile
    ) -> Int[np.ndarray[Any, Any], "layers kv_heads"]:
        """``budgets`` from a profile."""

    def least(self, budget: int, window: int) -> int:
        """The floor in tokens."""
        return min(budget, max(int(self.floor * budget), window + 1))


@lru_cache(maxsize=16)
def _budgets(
    policy: OfflineBudgets, shape: ModelShape, budget: int, window: int, profile: DemandProfile | None
) -> Int[np.ndarray[Any, Any], "layers kv_heads"]:
    """``policy.budgets``, computed once for all layers and for every cache after the first."""
    return policy.budgets(shape, budget, window, profile)


class OfflineLayers(OfflineBudgets, LayerAllocator):
    """A layer's total is the sum of its heads' budgets."""

    def allocate(
        self, shape: ModelShape, budget: int, window: int, profile: DemandProfile | None
    ) -> Int[Tensor, "layers"]:
        """The sums."""
        return torch.from_numpy(_budgets(self, shape, budget, window, profile).sum(1))


class OfflineHeads(OfflineBudgets, HeadAllocator):
    """Each head's own budget, for good; under other layer totals the shares within the layer are kept."""

    def for_layer(
        self, layer: int, shape: ModelShape, budget: int, window: int, profile: DemandProfile | None
    ) -> HeadAllocator:
        """The layer's fixed shares."""
        return self.for_layers([layer], shape, budget, window, profile)

    def for_layers(
        self, layers: Sequence[int], shape: ModelShape, budget: int, window: int, profile: DemandProfile | None
    ) -> HeadAllocator:
        """The layers' fixed shares."""
        budgets = _budgets(self, shape, budget, window, profile)[list(layers)]
        return FixedHeads(tuple(map(tuple, budgets.tolist())))

    def allocate(
        self,
        scores: Float[Tensor, "batch heads tokens"],
        lengths: Int[Tensor, "batch heads"],
        total: Int[Tensor, "batch"],
        least: int | Int[Tensor, "batch 1"],
    ) -> HeadSplit:
        """Not to be called: shares differ from layer to layer, see ``for_layer``."""
        raise TypeError(f"{type(self).__name__} splits a layer only after for_layer")


@dataclass(frozen=True)
class FixedHeads(HeadAllocator):
    """Shares of heads that do not depend on scores.

    Attributes:
        weights: one for each head of the layer; or, for a batch of several layers (see ``HeadAllocator.for_layers``),
            one such tuple for each layer.
    """

    weights: tuple[float, ...] | tuple[tuple[float, ...], ...]

    def allocate(
        self,
        scores: Float[Tensor, "batch heads tokens"],
        lengths: Int[Tensor, "batch heads"],
        total: Int[Tensor, "batch"],
        least: int | Int[Tensor, "batch 1"],
    ) -> HeadSplit:
        """Weighted shares; a head that holds less than its share leaves the rest to the others."""
        weights = _on_device(self.weights, lengths.device)
        check_layers(len(lengths), len(weights))
        return share_out(weights.repeat_interleave(len(lengths) // len(weights), 0), lengths, total, least)


@lru_cache(maxsize=256)
def _on_device(
    weights: tuple[float, ...] | tuple[tuple[float, ...], ...], device: torch.device
) -> Float[Tensor, "layers heads"]:
    """Copied once: a copy from the host would make the device wait at every routing."""
    return torch.atleast_2d(torch.tensor(weights, dtype=torch.float64, device=device))
