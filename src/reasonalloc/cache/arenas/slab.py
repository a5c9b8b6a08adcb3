"""One request's slab in its arena."""

from __future__ import annotations

import numpy as np
import torch

from reasonalloc.cache.arenas.pool import ArenaPool
from reasonalloc.cache.slab import RaggedSlab
from reasonalloc.cache.spans import HostInts, on_device
from reasonalloc.policies.scoring.tokens import LayerTokens


class ArenaSlab(RaggedSlab):
    """A slab of one sequence whose slots are an arena's.

    While a prompt needs more than the arena has, its tokens lie in memory of their own (``is_home`` is False); the
    compression at its end brings them back.
    """

    def __init__(self, pool: ArenaPool, index: int, capacities: HostInts) -> None:
        """An empty slab in arena ``index``."""
        self.pool, self.index = pool, index  # before anything is laid out
        like = pool.rows.new_empty(1, 1, 0, pool.layout.dim)
        super().__init__(like, like, capacities, pool.layout.tracks_received)

    @property
    def is_home(self) -> bool:
        """Whether the tokens lie in the arena."""
        return self.slots <= self.pool.layout.slots

    @property
    def seen(self) -> HostInts:
        """Tokens of the request so far: the table's number, which steps of all layers count."""
        return self.pool.seen[self.index : self.index + 1]

    @seen.setter
    def seen(self, seen: HostInts) -> None:
        self.pool.seen[self.index] = seen[0]

    def padded(self) -> LayerTokens:
        """All live tokens, a padded copy."""
        self.lengths_device = on_device(self.lengths, self.device)  # steps of all layers are counted on the host
        return super().padded()

    def share_evenly(self) -> None:
        """Lay the spans out anew, all within the arena, its free slots in equal parts."""
        spare, odd = divmod(self.pool.layout.slots - int(self.lengths.sum()), self.heads)
        self.grow(self.lengths + spare + (np.arange(self.heads) < odd))

    def _place(self, starts: HostInts, lengths: HostInts, capacities: HostInts) -> None:
        super()._place(starts, lengths, capacities)
        self.pool.place(self.index, starts[0], lengths[0], capacities[0])
        if capacities.sum() <= self.pool.layout.slots:  # what is counted in one place cannot differ in two
            self.lengths = self.pool.lengths[self.index : self.index + 1]
            self.lengths_device = on_device(self.lengths, self.device)

    def _resize(self, slots: int) -> None:
        layout = self.pool.layout
        if slots > layout.slots:
            super()._resize(slots)
            return
        rows = self.pool.arena(self.index)
        self.keys, self.values = rows[:slots], rows[layout.slots : layout.slots + slots]
        self.positions = rows[layout.positions].view(-1).view(torch.int32)[:slots]
        if self.received is not None:
            self.received = rows[layout.received].view(-1).view(torch.float32)[:slots]
