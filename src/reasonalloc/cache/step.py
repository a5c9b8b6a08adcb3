"""A step: what one forward pass does to the cache, prepared once for all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reasonalloc.cache.attention import AttentionBackend
from reasonalloc.cache.pool import Pool
from reasonalloc.cache.spans import Spans
from reasonalloc.cache.table import HostInts, Table, on_device


@dataclass(frozen=True)
class Chunk:
    """Several tokens of some rows: a prompt or a part of it, a new turn, speculative tokens.

    Attributes:
        rows: which rows of the table.
        columns: tokens in the chunk, padding included.
        counts: ``[rows]``, real tokens of each row, on the host.
        real: False marks padding; None if every token is real.
        ends_prompt: whether these tokens may be compressed as soon as they are there. False: the prompt goes on.
    """

    rows: HostInts
    columns: int
    counts: HostInts
    real: Bool[Tensor, "rows queries"] | None = None
    ends_prompt: bool = True

    @classmethod
    def of(cls, rows: HostInts, columns: int, ends_prompt: bool = True) -> Chunk:
        """A chunk without padding."""
        return cls(rows, columns, np.full(len(rows), columns, dtype=np.int64), None, ends_prompt)

    @classmethod
    def masked(cls, rows: HostInts, real: Bool[Tensor, "rows queries"]) -> Chunk:
        """A chunk with padding where ``real`` is False. One wait for the device."""
        counts = real.sum(-1).cpu().numpy()
        if int(counts.min(initial=real.shape[1])) == real.shape[1]:
            return cls.of(rows, real.shape[1])
        return cls(rows, real.shape[1], counts, real)

    def without_last(self, columns: int) -> Chunk:
        """The same without its newest tokens, none of them padding."""
        return Chunk.of(self.rows, self.columns - columns, self.ends_prompt)

    def hidden(self, device: torch.device) -> Int[Tensor, "rows queries"]:
        """How many of the chunk's tokens each query must not see; -1 for padding."""
        if self.real is None:
            return torch.arange(self.columns - 1, -1, -1, device=device).expand(len(self.counts), -1)
        later = self.real.sum(-1, keepdim=True) - self.real.cumsum(-1)
        return later.masked_fill(~self.real, -1)


class Decode:
    """One token of each of some rows, for as long as the spans stay where they are.

    Made after a round, or where other rows decode; from then on a step changes numbers in place (``advance``), a few
    operations for all layers together. What a layer does is in ``layer``.

    Attributes:
        rows: which rows of the table.
        spans: of each layer, the new tokens included.
    """

    def __init__(self, table: Table, pools: Sequence[Pool], rows: HostInts, backend: AttentionBackend) -> None:
        self.table, self.rows, self._backend = table, rows, backend
        device = pools[0].keys.device
        everything = len(rows) == table.rows and bool((rows == np.arange(table.rows)).all())
        self._own = not everything  # whether the numbers are copies of the table's, which must be counted, too
        self._at: slice | HostInts = slice(None) if everything else rows
        starts, lengths, capacities = (x[:, self._at] for x in (table.starts, table.lengths, table.capacities))
        self._lengths = lengths
        flat = (table.layers, -1)
        self._slots = on_device((starts + lengths - 1).reshape(flat), device)  # ``advance`` comes before the first use
        of_layers = [(pool, g) for pool in pools for g in range(len(pool.layers))]
        shift = np.stack([pool.shift[g, rows] for pool, g in of_layers])
        places = starts + shift[..., None]
        self._places = None
        if pools[0].received is not None:
            self._places = on_device((places + lengths - 1).reshape(flat), device)
        ring = pools[0].queries
        self._size, self._heads = ring.size, ring.heads
        self._cursor = on_device(table.pushed[rows] - 1, device)[:, None]
        base = np.stack([pool.queries.base[g, rows] for pool, g in of_layers])
        self._base = on_device(base[..., None] + np.arange(self._heads), device)
        self._ring = torch.empty_like(self._base)
        sent = [on_device(x, device) for x in (starts, lengths, places)]
        self._counted = sent[1]
        self.spans = [
            Spans(
                pool.keys, pool.values, pool.received,
                starts[layer], lengths[layer], capacities[layer],
                sent[0][layer], sent[1][layer], places[layer], sent[2][layer],
            )
            for layer, (pool, _) in enumerate(of_layers)
        ]  # fmt: skip
        self._rings = [pool.queries.memory for pool, _ in of_layers]
        self._of_layer = [
            (slots, None if self._places is None else self._places[layer], ring.flatten())
            for layer, (slots, ring) in enumerate(zip(self._slots, self._ring, strict=True))
        ]

    def advance(self) -> None:
        """Count the tokens that now come, once for all layers."""
        table, rows = self.table, self.rows
        table.lengths[:, self._at] += 1
        if self._own:
            self._lengths += 1
        for counts in (table.seen, table.steps, table.pushed):
            counts[rows] += 1
        self._slots.add_(1)
        if self._slots.device.type != "cpu":  # on the CPU the spans' tensors share the host's memory
            self._counted.add_(1)
        if self._places is not None:
            self._places.add_(1)
        if self._size:
            self._cursor.add_(1)
            torch.add(self._base, (self._cursor % self._size) * self._heads, out=self._ring)

    def layer(
        self,
        layer: int,
        query: Float[Tensor, "rows query_heads 1 dim"],
        key: Float[Tensor, "rows heads 1 dim"],
        value: Float[Tensor, "rows heads 1 value_dim"],
        scaling: float,
    ) -> Float[Tensor, "rows query_heads 1 value_dim"]:
        """What a layer does in a step: it scatters keys, values and queries, and attends."""
        spans = self.spans[layer]
        slots, places, ring = self._of_layer[layer]
        spans.keys.index_copy_(0, slots, key.reshape(-1, key.shape[-1]))
        spans.values.index_copy_(0, slots, value.reshape(-1, value.shape[-1]))
        if self._size:
            self._rings[layer].index_copy_(0, ring, query.reshape(-1, query.shape[-1]))
        if places is not None:
            assert spans.received is not None
            spans.received.index_fill_(0, places, 0.0)
        return self._backend.attend(query, spans, scaling)


@dataclass
class Step:
    """One forward pass.

    Attributes:
        decode: the rows that decode one token; None if none does.
        chunks: all others.
        done: how many layers have run. A pass that was broken off leaves it below the number of layers.
    """

    decode: Decode | None
    chunks: Sequence[Chunk] = field(default_factory=tuple)
    done: int = 0
