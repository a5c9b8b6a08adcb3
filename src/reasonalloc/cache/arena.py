"""What lies where in an arena."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

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


def neighbours(
    numbers: list[int], memory: Mapping[int, Tensor], layouts: Mapping[int, ArenaLayout], most: int
) -> list[list[int]]:
    """Layers in groups of at most ``most`` whose memory lies one behind the other, and is laid out alike."""
    groups: list[list[int]] = []
    for number in numbers:
        last = groups[-1][-1] if groups else None
        if (
            last is not None
            and len(groups[-1]) < most
            and layouts[last] == layouts[number]
            and memory[last].data_ptr() + memory[last].nbytes == memory[number].data_ptr()
            and memory[last].untyped_storage().data_ptr() == memory[number].untyped_storage().data_ptr()
        ):
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


def joined(memory: list[Tensor]) -> Tensor:
    """Memory that lies one behind the other, as one tensor."""
    first = memory[0]
    if len(memory) == 1:
        return first
    return torch.as_strided(first, (len(memory), *first.shape), (first.numel(), *first.stride()))
