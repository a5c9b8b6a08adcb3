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
from reasonalloc.cache.table import DeviceTable, HostInts, Table, on_device
from reasonalloc.kernels.chunks import ChunkTable
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
    """One token of each of some rows, prepared once for all layers.

    All numbers of a step lie where the keys are, in tensors that are made once and filled in place: a step that was
    recorded (a CUDA graph) finds them. ``prepare`` copies there what depends on which rows decode and how large their
    spans are; ``advance`` changes what every step changes, in a few operations for all layers, and asks the host
    nothing.

    Attributes:
        rows: which rows of the table decode.
    """

    def __init__(
        self,
        table: Table,
        device: DeviceTable,
        pools: Sequence[Pool],
        backend: AttentionBackend,
        most: int | None,
        grows: bool,
    ) -> None:
        """
        Args:
            table, device: the numbers.
            pools: the memory.
            backend: attends.
            most: rows are any of the table's, at most so many, in lent memory; one that comes several times, as
                padding does, takes one token. None: they are always all of them.
            grows: layers grow at the cost of others, in the same memory: chunks are made for a quarter more slots.
        """
        self.table, self._device, self._backend, self._some = table, device, backend, most is not None
        self._layers = [(pool, g) for pool in pools for g in range(len(pool.layers))]
        self._pools, self._most = pools, table.rows if most is None else most
        ring = pools[0].queries
        self._size, self._heads, self._tracks = ring.size, ring.heads, pools[0].received is not None
        shape, where, some = (table.layers, self._most, table.heads), device.device, self._some

        def zeros(*sizes: int) -> Tensor:
            return torch.zeros(sizes, dtype=torch.int64, device=where)

        self._starts, self._lengths = (zeros(*shape), zeros(*shape)) if some else (device.starts, device.lengths)
        self._slots, self._places = zeros(*shape), zeros(*shape)
        self._new_places = zeros(*shape)
        self._index, self._shift = zeros(self._most), zeros(*shape[:2], 1)
        self._base, self._ring = zeros(*shape[:2], self._heads), zeros(*shape[:2], self._heads)
        self._chunks: ChunkTable | None = None
        self._grows, self._room = grows, 0  # slots of a layer that the chunks are made for
        self.rows = np.zeros(0, dtype=np.int64)
        self._moves = -1
        self._views: list[tuple[Spans, Tensor, Tensor, Tensor]] = []

    def prepare(self, rows: HostInts) -> None:
        """Before the next step: which rows decode, and where their spans are now. It does not wait for the device."""
        if self._moves == self.table.moves and np.array_equal(rows, self.rows):
            return
        where, count = self._device.device, len(rows)
        if not np.array_equal(rows, self.rows):
            self.rows = rows
            shift = np.concatenate([pool.shift[:, rows] for pool in self._pools])
            base = np.concatenate([pool.queries.base[:, rows] for pool in self._pools])
            self._index[:count].copy_(on_device(rows, where), non_blocking=True)
            self._shift[:, :count].copy_(on_device(shift[..., None], where), non_blocking=True)
            self._base[:, :count].copy_(on_device(base[..., None] + np.arange(self._heads), where), non_blocking=True)
        self._cut(count)
        self._moves = self.table.moves
        if not self._some or (len(self._views) and self._views[0][0].rows != count):
            self._views = []

    def _cut(self, count: int) -> None:
        """What the backend wants prepared, of the spans of ``count`` rows."""
        if self._some:
            slots = self._most * max(int(pool.sizes.max(initial=0)) for pool in self._pools)
        else:
            slots = max(int(pool.sizes.sum(1).max(initial=0)) for pool in self._pools)
        if slots > self._room:
            self._room = slots + slots // 4 if self._grows else slots
            layers, heads = self.table.layers, self.table.heads
            self._chunks = self._backend.table(layers, self._most, heads, self._room, self._device.device)
        if self._chunks is not None:
            capacities = self._device.capacities
            self._chunks.fill(capacities.index_select(1, self._index[:count]) if self._some else capacities)

    def let_go(self) -> None:
        """Forget memory that may be replaced, which lent memory is not; ``prepare`` before the next step."""
        self._moves = -1
        if not self._some:
            self._views = []

    def _look(self) -> list[tuple[Spans, Tensor, Tensor, Tensor]]:
        """Of each layer: spans, new tokens included; slots and places of these tokens; places of their queries."""
        count, views = len(self.rows), []
        for layer, (pool, _) in enumerate(self._layers):
            spans = Spans(
                pool.keys, pool.values, pool.received,
                self._starts[layer, :count], self._lengths[layer, :count], self._places[layer, :count], len(pool.keys),
                None if self._chunks is None else self._chunks.layer(layer, count * self.table.heads),
            )  # fmt: skip
            slots, places, ring = (x[layer, :count].view(-1) for x in (self._slots, self._new_places, self._ring))
            views.append((spans, slots, places, ring))
        return views

    def count(self) -> None:
        """Count the tokens that now come, on the host."""
        table, rows = self.table, self.rows
        table.young[:, rows] += 1
        for counts in (table.seen, table.steps, table.pushed):
            counts[rows] += 1

    def advance(self) -> None:
        """Count them where the keys are, once for all layers."""
        device, index = self._device, self._index[: len(self.rows)]
        of = (slice(None), slice(len(self.rows)))
        starts, lengths, slots = self._starts[of], self._lengths[of], self._slots[of]
        if self._some:
            torch.index_select(device.starts, 1, index, out=starts)
            torch.index_select(device.lengths, 1, index, out=lengths)
        torch.add(starts, lengths, out=slots)
        lengths.add_(1)
        if self._some:
            device.lengths.index_copy_(1, index, lengths)
        if self._tracks:
            torch.add(starts, self._shift[of], out=self._places[of])
            torch.add(slots, self._shift[of], out=self._new_places[of])
        if self._size:
            cursor = device.pushed.index_select(0, index) if self._some else device.pushed
            torch.add(self._base[of], ((cursor % self._size) * self._heads)[:, None], out=self._ring[of])
            if self._some:
                device.pushed.index_copy_(0, index, cursor + 1)
            else:
                cursor.add_(1)

    def layer(
        self,
        layer: int,
        query: Float[Tensor, "rows query_heads 1 dim"],
        key: Float[Tensor, "rows heads 1 dim"],
        value: Float[Tensor, "rows heads 1 value_dim"],
        scaling: float,
    ) -> Float[Tensor, "rows query_heads 1 value_dim"]:
        """What a layer does in a step: it scatters keys, values and queries, and attends."""
        self._views = self._views or self._look()
        spans, slots, received_at, ring = self._views[layer]
        spans.keys.index_copy_(0, slots, key.reshape(-1, key.shape[-1]))
        spans.values.index_copy_(0, slots, value.reshape(-1, value.shape[-1]))
        if self._size:
            self._layers[layer][0].queries.memory.index_copy_(0, ring, query.reshape(-1, query.shape[-1]))
        if spans.received is not None:
            spans.received.index_fill_(0, received_at, 0.0)
        return self._backend.attend(query, spans, scaling)

    # ---- recording ----

    def changed(self) -> list[Tensor]:
        """All that a step changes beside free slots: what a recorder must put back after its trials."""
        rings = [pool.queries.memory for pool in self._pools if self._size and not pool.is_lent]
        received = [pool.received for pool in self._pools if pool.received is not None]
        return [self._device.lengths, self._device.pushed, *rings, *received]

    def fixed(self) -> tuple[int, ...]:
        """Addresses of all that a recorded step reads and writes; they change when memory is replaced."""
        memory = [x for pool in self._pools for x in (pool.keys, pool.values, pool.received, pool.queries.memory)]
        chunks = () if self._chunks is None else (self._chunks.rows,)
        tensors = (*memory, self._device.lengths, self._slots, *chunks)
        return tuple(x.data_ptr() for x in tensors if x is not None)


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
