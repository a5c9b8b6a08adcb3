"""The last queries of one request, in its arena."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from torch import Tensor

from reasonalloc.cache.arenas.pool import ArenaPool
from reasonalloc.cache.query_window import Queries, QueryWindow
from reasonalloc.cache.spans import on_device


class QueryRing(QueryWindow):
    """A query window whose memory does not grow: the arena's ring."""

    def __init__(self, pool: ArenaPool, index: int) -> None:
        super().__init__(pool.layout.queries)
        self.pool, self.index = pool, index
        self.clear()

    @property
    def _states(self) -> Float[Tensor, "queries query_heads dim"]:
        layout = self.pool.layout
        return self.pool.arena(self.index)[layout.ring].view(layout.queries, layout.query_heads, layout.dim)

    def push(self, queries: Queries) -> None:
        """Append the queries of one forward pass, none of them padding."""
        assert queries.real is None, "an arena holds one request, which has no padding"
        states = queries.last(self.size).states[0].transpose(0, 1)
        if self.size and len(states):
            at = int(self.pool.pushed[self.index]) + np.arange(len(states))
            self._states[on_device(at % self.size, states.device)] = states
            self.pool.pushed[self.index] += len(states)

    def read(self) -> Queries | None:
        """The window, oldest first, or None if it is empty or not wanted."""
        pushed = int(self.pool.pushed[self.index])
        if not self.size or not pushed:
            return None
        at = np.arange(max(0, pushed - self.size), pushed) % self.size
        states = self._states[on_device(at, self.pool.rows.device)]
        return Queries(states.transpose(0, 1)[None])

    def clear(self) -> None:
        """Forget everything."""
        self.pool.pushed[self.index] = 0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._states.nbytes
