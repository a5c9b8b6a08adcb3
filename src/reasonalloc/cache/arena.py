"""What lies where in an arena."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reasonalloc.policies.allocation import ModelShape
from reasonalloc.policies.compression import Compression


@dataclass(frozen=True)
class ArenaLayout:
    """An arena is a matrix of rows as long as a key: keys, values, the ring of last queries, positions, attention.

    Attributes:
        slots: tokens over all heads: the layer's budget, and an interval for every head.
        heads, query_heads: of the layer.
        dim: of keys and of values, which must be equally wide.
        dtype: of keys, values and queries.
        queries: last queries to remember.
        tracks_received: whether accumulated attention is kept for every slot.
    """

    slots: int
    heads: int
    query_heads: int
    dim: int
    dtype: torch.dtype
    queries: int
    tracks_received: bool

    @classmethod
    def of(cls, compression: Compression, shape: ModelShape, total: int, dtype: torch.dtype) -> ArenaLayout:
        """For a layer whose heads share ``total`` tokens."""
        return cls(
            slots=total + shape.kv_heads * compression.interval,
            heads=shape.kv_heads,
            query_heads=shape.query_heads,
            dim=shape.head_dim,
            dtype=dtype,
            queries=compression.observed_queries,
            tracks_received=compression.tracks_received,
        )

    @property
    def row_bytes(self) -> int:
        """Bytes of one key."""
        return self.dim * self.dtype.itemsize

    @property
    def ring(self) -> slice:
        """Rows of the remembered queries: all heads of one query, then of the next."""
        return slice(2 * self.slots, 2 * self.slots + self.queries * self.query_heads)

    @property
    def positions(self) -> slice:
        """Rows of the positions (int32, one per slot)."""
        return slice(self.ring.stop, self.ring.stop + self._rows_of(4 * self.slots))

    @property
    def received(self) -> slice:
        """Rows of the accumulated attention (float32, one per slot), if it is kept."""
        rows = self._rows_of(4 * self.slots) if self.tracks_received else 0
        return slice(self.positions.stop, self.positions.stop + rows)

    @property
    def rows(self) -> int:
        """Rows of an arena, an even number: engines count in pairs of a key and a value."""
        return self.received.stop + self.received.stop % 2

    @property
    def nbytes(self) -> int:
        """Bytes of an arena."""
        return self.rows * self.row_bytes

    def _rows_of(self, nbytes: int) -> int:
        return -(-nbytes // self.row_bytes)
