"""The last queries of every row, remembered in a ring for the next round."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reasonalloc.cache.table import HostInts, on_device
from reasonalloc.policies.scoring.tokens import drop_padding


@dataclass(frozen=True)
class Queries:
    """Queries of several rows, oldest first; ``real`` marks those that exist, None if all do."""

    states: Float[Tensor, "rows query_heads queries dim"]
    real: Bool[Tensor, "rows queries"] | None = None

    def __len__(self) -> int:
        return self.states.shape[2]

    def last(self, count: int) -> Queries:
        """The last ``count``, a view."""
        first = max(0, len(self) - count)
        return Queries(self.states[:, :, first:], None if self.real is None else self.real[:, first:])

    def without_last(self, count: int) -> Queries:
        """All but the last ``count``, a view."""
        keep = len(self) - count
        return Queries(self.states[:, :, :keep], None if self.real is None else self.real[:, :keep])


class QueryRing:
    """Room for the last ``size`` queries of every row of some layers. Query ``i`` of a row lies at ``i % size``.

    How many queries went in is the table's number (``pushed``), the same for all layers.

    Attributes:
        memory: ``[places, dim]`` in the model's dtype. All heads of one query lie together.
        base: ``[layers, rows]``, the place of each row's first head of query 0.
        size: queries per row; 0 where nobody asks.
        heads: query heads.
    """

    def __init__(self, memory: Float[Tensor, "places dim"], base: HostInts, size: int, heads: int) -> None:
        self.memory, self.base, self.size, self.heads = memory, base, size, heads

    @property
    def nbytes(self) -> int:
        """Bytes of the remembered queries."""
        per_row = self.size * self.heads * self.memory.shape[1] * self.memory.element_size()
        return int(self.base.size) * per_row

    def push(self, layer: int, rows: HostInts, queries: Queries, counts: HostInts, pushed: HostInts) -> None:
        """Write the queries of a chunk, padding left out.

        Args:
            layer: counted within ``base``.
            rows: which rows.
            queries: theirs.
            counts: ``[rows]``, how many of them are real.
            pushed: ``[rows]``, how many went in before.
        """
        if not self.size:
            return
        states = queries.states if queries.real is None else drop_padding(queries.states, queries.real)
        stay = np.minimum(counts, self.size)  # older ones would be overwritten at once
        row = np.repeat(np.arange(len(rows)), stay)
        nth = np.arange(len(row)) - np.repeat(stay.cumsum() - stay, stay) + np.repeat(counts - stay, stay)
        at = self.base[layer, rows][row] + (pushed[row] + nth) % self.size * self.heads
        places = (at[:, None] + np.arange(self.heads)).reshape(-1)
        device = self.memory.device
        chosen = states.transpose(1, 2)[on_device(row, device), on_device(nth, device)]
        self.memory.index_copy_(0, on_device(places, device), chosen.reshape(-1, self.memory.shape[1]))

    def read(self, rows: HostInts, pushed: HostInts, count: int) -> Queries:
        """The last ``count`` queries of ``rows`` in each layer: ``[layers * rows, query_heads, count, dim]``.

        Of a row that has fewer, the missing ones come first and are not real.
        """
        held = np.minimum(pushed, self.size)
        age = np.arange(count - 1, -1, -1)
        exists = age < held[:, None]
        nth = (pushed[:, None] - 1 - np.where(exists, age, 0)) % self.size  # one that exists, in place of a missing one
        device = self.memory.device
        at = on_device(self.base[:, rows], device)[:, :, None, None] + torch.arange(self.heads, device=device)[:, None]
        places = at + on_device(nth * self.heads, device)[:, None, :]
        states = self.memory.index_select(0, places.flatten())
        states = states.view(len(self.base) * len(rows), self.heads, count, self.memory.shape[1])
        if exists.all():
            return Queries(states)
        return Queries(states, on_device(np.tile(exists, (len(self.base), 1)), device))
