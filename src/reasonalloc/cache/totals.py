"""The layers' totals during one cache's life: fixed by an offline allocator, or re-split every round."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reasonalloc.cache.spans import HostInts
from reasonalloc.policies.allocation import DynamicLayers, ModelShape
from reasonalloc.policies.allocation.offline_heads import OfflineBudgets
from reasonalloc.policies.compression import Compression


class LayerBudgets:
    """Tokens per layer and sequence, summing to ``layers * heads * budget`` for each sequence at any time.

    Layers run one after another. The first layer opens a routing round; with a dynamic allocator the totals of a
    round come from the demands that all layers reported in the rounds before.
    """

    def __init__(self, compression: Compression, shape: ModelShape) -> None:
        assert compression.budget is not None
        self.compression = compression
        self.shape = shape
        self.budget = compression.budget
        allocator = compression.layer_allocator
        self._fixed = allocator.allocate(
            shape, self.budget, compression.kept_window, compression.demand_profile
        ).numpy()
        self.dynamic = allocator if isinstance(allocator, DynamicLayers) else None
        self.reset()

    def reset(self) -> None:
        """Forget all measured demand."""
        self._average: Float[Tensor, "batch layers"] | None = None
        self._reported: set[int] = set()
        self._totals: HostInts | None = None

    def totals(self, layer: int, batch: int) -> HostInts:
        """The layer's tokens over all heads, for each sequence."""
        if self._totals is None:
            return np.full(batch, self._fixed[layer], dtype=np.int64)
        return self._totals[:, layer].copy()

    def open_round(self) -> None:
        """Before the first layer of a routing round: re-split by what all layers have reported."""
        if self.dynamic is None or self._average is None or len(self._reported) < self.shape.layers:
            return
        split = self.dynamic.split(self._average, self.shape, self.budget, self.compression.kept_window)
        self._totals = split.cpu().numpy()

    def report(self, layer: int, demand: Float[Tensor, "batch"]) -> None:
        """A layer's measured demand in the current round, per sequence."""
        assert self.dynamic is not None
        demand = demand.to(torch.float64).cpu()
        if self._average is None:
            self._average = demand.new_zeros(len(demand), self.shape.layers)
        keep = self.dynamic.decay if layer in self._reported else 0.0
        self._average[:, layer] = keep * self._average[:, layer] + (1 - keep) * demand
        self._reported.add(layer)

    def select_sequences(self, indices: Sequence[int]) -> None:
        """Keep, repeat and reorder sequences."""
        rows = list(indices)
        if self._average is not None:
            self._average = self._average[rows]
        if self._totals is not None:
            self._totals = self._totals[rows]


def check_ranks(compression: Compression) -> None:
    """Raise ``ValueError`` for a policy that tensor-parallel ranks, which route alone, cannot follow."""
    for policy in (compression.layer_allocator, compression.head_allocator):
        if isinstance(policy, OfflineBudgets):
            raise ValueError(
                f"{type(policy).__name__} sets budgets for the heads of all ranks at once, and ranks route alone: "
                "choose layers wave or dynamic, heads threshold, or run without tensor parallelism"
            )
