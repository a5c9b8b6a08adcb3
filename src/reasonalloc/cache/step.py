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
from reasonalloc.policies.scoring.tokens import drop_padding


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

    def packed(self, states: Float[Tensor, "rows heads queries dim"]) -> Float[Tensor, "rows heads queries dim"]:
        """A layer's states of the chunk, padding left out: each row's real tokens come first."""
        return states if self.real is None else drop_padding(states, self.real)

    def hidden(self, device: torch.device) -> Int[Tensor, "rows queries"]:
        """How many of the chunk's tokens each query must not see; -1 for padding."""
        if self.real is None:
            return torch.arange(self.columns - 1, -1, -1, device=device).expand(len(self.counts), -1)
        later = self.real.sum(-1, keepdim=True) - self.real.cumsum(-1)
        return later.masked_fill(~self.real, -1)


class Decode:
    """One token of each of some rows, for as long as the same rows decode.

    What the host knows of the rows is copied to where the keys are (``fill``), for all layers together, when a round
    has moved their spans; a step then changes these numbers in place, in a few operations for all layers
    (``advance``). The tensors are never replaced. On a CPU they are the host's own memory. They are int64 everywhere:
    a slot times its channels does not fit int32 in a large pool.

    Attributes:
        rows: which rows of the table.
        spans: of each layer, the new tokens included.
        moves: of the table when it was last read.
    """

    def __init__(self, table: Table, pools: Sequence[Pool], rows: HostInts, backend: AttentionBackend) -> None:
        self.table, self.rows, self._backend = table, rows, backend
        self._layers = [(pool, g) for pool in pools for g in range(len(pool.layers))]
        self._device = device = pools[0].keys.device
        shape = (table.layers, len(rows), table.heads)
        everything = len(rows) == table.rows and bool((rows == np.arange(table.rows)).all())
        # All rows: the table's own numbers, which change by themselves. Some: copies.
        self._at: slice | HostInts = slice(None) if everything else rows
        self._copied = not everything
        self._shift = np.stack([pool.shift[g, rows] for pool, g in self._layers])[..., None]
        self._places = np.zeros(shape, dtype=np.int64)
        numbers = (table.starts, table.lengths, table.capacities)
        # Views, or compact copies: a layer's part of them lies in one piece.
        own = (lambda x: np.ascontiguousarray(x[:, rows])) if self._copied else (lambda x: x)
        self._starts, self._lengths, self._capacities = map(own, numbers)
        self._sent = [on_device(x, device) for x in (self._starts, self._lengths, self._places)]
        self._slots, self._received_at = (torch.empty(shape, dtype=torch.int64, device=device) for _ in range(2))
        ring = pools[0].queries
        self._size, self._heads, self._tracks = ring.size, ring.heads, pools[0].received is not None
        self._cursor = torch.empty(len(rows), 1, dtype=torch.int64, device=device)
        base = np.stack([pool.queries.base[g, rows] for pool, g in self._layers])
        self._base = on_device(base[..., None] + np.arange(self._heads), device)
        self._ring = torch.empty_like(self._base)
        self._of_layer = [
            tuple(x[layer].view(-1) for x in (self._slots, self._received_at, self._ring))
            for layer in range(table.layers)
        ]
        self.fill()

    def fill(self) -> None:
        """Copy what the table says of the rows, after their spans have moved."""
        table, device = self.table, self._device
        self.moves = table.moves
        if self._copied:
            for own, numbers in (
                (self._starts, table.starts),
                (self._lengths, table.lengths),
                (self._capacities, table.capacities),
            ):
                own[:] = numbers[:, self._at]
        np.add(self._starts, self._shift, out=self._places)
        if device.type != "cpu":
            for tensor, numbers in zip(self._sent, (self._starts, self._lengths, self._places), strict=True):
                tensor.copy_(on_device(numbers, device))
        before = self._lengths - 1  # ``advance`` comes before the first use
        self._slots.copy_(on_device(self._starts + before, device))
        self._received_at.copy_(on_device(self._places + before, device))
        self._cursor.copy_(on_device(table.pushed[self.rows, None] - 1, device))
        starts, lengths, places = self._sent
        self.spans = [
            Spans(
                pool.keys, pool.values, pool.received,
                self._starts[layer], self._lengths[layer], self._capacities[layer],
                starts[layer], lengths[layer], self._places[layer], places[layer],
            )
            for layer, (pool, _) in enumerate(self._layers)
        ]  # fmt: skip

    def let_go(self) -> None:
        """Forget the pools' memory, which may be replaced; ``fill`` before the next step."""
        self.spans, self.moves = [], -1

    def advance(self) -> None:
        """Count the tokens that now come, once for all layers."""
        table, rows = self.table, self.rows
        table.lengths[:, self._at] += 1
        if self._copied:
            self._lengths += 1
        for counts in (table.seen, table.steps, table.pushed):
            counts[rows] += 1
        if self._device.type != "cpu":
            self._sent[1].add_(1)
        self._slots.add_(1)
        if self._tracks:
            self._received_at.add_(1)
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
        slots, received_at, ring = self._of_layer[layer]
        spans.keys.index_copy_(0, slots, key.reshape(-1, key.shape[-1]))
        spans.values.index_copy_(0, slots, value.reshape(-1, value.shape[-1]))
        if self._size:
            self._layers[layer][0].queries.memory.index_copy_(0, ring, query.reshape(-1, query.shape[-1]))
        if spans.received is not None:
            spans.received.index_fill_(0, received_at, 0.0)
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
