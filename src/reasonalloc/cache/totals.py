"""The layers' totals during one cache's life: fixed by an offline allocator, or re-split every round."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from reasonalloc.cache.table import HostInts
from reasonalloc.policies.allocation import DynamicLayers, ModelShape
from reasonalloc.policies.allocation.offline_heads import OfflineBudgets
from reasonalloc.policies.compression import Compression


class LayerTotals:
    """Tokens of every layer and row, summing to ``layers * heads * budget`` for each row at any time.

    With a dynamic allocator the totals of a round come from the demands that all layers reported in the rounds before.

    Attributes:
        dynamic: the allocator, if it measures demand while decoding.
    """

    def __init__(self, compression: Compression, shape: ModelShape) -> None:
        assert compression.budget is not None
        self.compression = compression
        self.shape = shape
        self.budget = compression.budget
        allocator = compression.layer_allocator
        with torch.device("cpu"):  # whatever the caller's default device is
            fixed = allocator.allocate(shape, self.budget, compression.least, compression.demand_profile)
        self._fixed = fixed.numpy()
        self.dynamic = allocator if isinstance(allocator, DynamicLayers) else None
        self.reset()

    def reset(self) -> None:
        """Forget all measured demand."""
        self._average: Float[Tensor, "rows layers"] | None = None
        self._reported: set[int] = set()
        self._totals: HostInts | None = None

    def of(self, layers: HostInts, rows: HostInts) -> HostInts:
        """Tokens over all heads, ``[layers, rows]``."""
        if self._totals is None:
            return np.repeat(self._fixed[layers][:, None], len(rows), axis=1)
        return self._totals[rows][:, layers].T

    def fixed(self, layer: int) -> int:
        """Tokens of a layer over all heads, before anything is measured."""
        return int(self._fixed[layer])

    def open_round(self) -> None:
        """Before the first layer of a round: re-split by what all layers have reported."""
        if self.dynamic is None or self._average is None or len(self._reported) < self.shape.layers:
            return
        split = self.dynamic.split(self._average, self.shape, self.budget, self.compression.least)
        self._totals = split.cpu().numpy()

    def report(self, layers: HostInts, demand: npt.NDArray[np.float64]) -> None:
        """The measured demand of some layers in the current round, ``[layers, rows]``, of all rows."""
        assert self.dynamic is not None
        if self._average is None:
            self._average = torch.zeros(demand.shape[1], self.shape.layers, dtype=torch.float64, device="cpu")
        for layer, of_layer in zip(layers.tolist(), torch.from_numpy(demand), strict=True):
            keep = self.dynamic.decay if layer in self._reported else 0.0
            self._average[:, layer] = keep * self._average[:, layer] + (1 - keep) * of_layer
            self._reported.add(layer)

    def select(self, rows: Sequence[int]) -> None:
        """Keep, repeat and reorder rows."""
        index = list(rows)
        if self._average is not None:
            self._average = self._average[index]
        if self._totals is not None:
            self._totals = self._totals[index]


def check_ranks(compression: Compression) -> None:
    """Raise ``ValueError`` for a policy that tensor-parallel ranks, which route alone, cannot follow."""
    for policy in (compression.layer_allocator, compression.head_allocator):
        if isinstance(policy, OfflineBudgets):
            raise ValueError(
                f"{type(policy).__name__} sets budgets for the heads of all ranks at once, and ranks route alone: "
                "choose layers wave or dynamic, heads threshold, or run without tensor parallelism"
            )
