"""The memory of a cache: slots for keys and values, and what is kept beside them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from reasonalloc.cache.arena import ArenaLayout
from reasonalloc.cache.queries import QueryRing
from reasonalloc.cache.table import HostInts, Table, on_device


@dataclass(frozen=True)
class Survivors:
    """What is written into a pool: some tokens of a batch of rows, layer-major (``layers * rows``).

    Attributes:
        keys, values: ``[source, dim]``, where the tokens are taken from.
        first: ``[layers, rows, heads]``, where each span's tokens begin there.
        kept: ``[layers, rows, heads]``, how many of them stay.
        index: ``[layers * rows, heads, width]``, which of a span's tokens; None: the first ones.
        positions, received: ``[layers * rows, heads, tokens]`` of the tokens, or None: there are none to be written.
    """

    keys: Float[Tensor, "source dim"]
    values: Float[Tensor, "source value_dim"]
    first: HostInts
    kept: HostInts
    index: Int[Tensor, "batch heads width"] | None = None
    positions: Int[Tensor, "batch heads tokens"] | None = None
    received: Float[Tensor, "batch heads tokens"] | None = None


class Pool:
    """Memory of some consecutive layers, for all rows.

    It is *owned*: allocated here, as large as the rows' spans, which lie one behind the other; or *lent*: equal blocks
    of an engine's memory, one for each row and layer (an arena), in which the spans of that row lie. A slot is an
    index into ``keys`` and ``values``; the table says where each row's spans begin.

    Attributes:
        table: the numbers of all layers.
        layers: ``[layers]``, which of the table's layers lie here.
        keys, values: ``[slots, dim]`` in the model's dtype.
        positions: ``[places]`` int32, a settled token's index in its row's text.
        received: ``[places]`` float32, accumulated attention of every token, or None if it is not tracked.
        shift: ``[layers, rows]``, what leads from a row's slots to its places in ``positions`` and ``received``.
        queries: the ring of last queries.
    """

    def __init__(
        self,
        table: Table,
        layers: Sequence[int],
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        received: Tensor | None,
        shift: HostInts,
        queries: QueryRing,
        arena: ArenaLayout | None = None,
        base: HostInts | None = None,
    ) -> None:
        self.table, self.layers = table, np.array(layers, dtype=np.int64)
        self.keys, self.values, self.positions, self.received = keys, values, positions, received
        self.shift, self.queries, self._arena, self._base = shift, queries, arena, base

    @classmethod
    def owned(
        cls,
        table: Table,
        layers: Sequence[int],
        key: Float[Tensor, "rows heads tokens dim"],
        value: Float[Tensor, "rows heads tokens value_dim"],
        window: int,
        query_heads: int,
        track_received: bool,
    ) -> Pool:
        """An empty pool for tensors like these; the first rewrite makes its memory.

        Args:
            table, layers: as the attributes.
            key, value: of the model's width, dtype and device; their content is not read.
            window: last queries to remember.
            query_heads: of a layer.
            track_received: whether accumulated attention is kept.
        """
        spans, device = (len(layers), table.rows), key.device
        base = np.arange(spans[0] * spans[1]).reshape(spans) * window * query_heads
        memory = key.new_empty(base.size * window * query_heads, key.shape[-1])
        return cls(
            table,
            layers,
            key.new_empty(0, key.shape[-1]),
            value.new_empty(0, value.shape[-1]),
            torch.empty(0, dtype=torch.int32, device=device),
            torch.empty(0, device=device) if track_received else None,
            np.zeros(spans, dtype=np.int64),
            QueryRing(memory, base, window, query_heads),
        )

    @classmethod
    def lent(cls, table: Table, layers: Sequence[int], memory: Tensor, layout: ArenaLayout) -> Pool:
        """A pool in an engine's memory.

        Slot ``i`` of an arena has its key in row ``arena * layout.rows + i`` of the memory and its value
        ``layout.slots`` rows further on. So one pair of views serves all arenas: all rows but the last ``slots``, and
        all but the first.

        Args:
            table: one row for each arena.
            layers: as the attribute.
            memory: the arenas of each layer, one layer behind the other; contiguous, of any dtype.
            layout: of every arena.

        Raises:
            ValueError: the memory is not as large as that.
        """
        spans = (len(layers), table.rows)
        wanted = spans[0] * spans[1] * layout.nbytes
        if memory.nbytes != wanted or not memory.is_contiguous():
            raise ValueError(
                f"{spans[1]} arenas of {spans[0]} layers must be contiguous and of {layout.nbytes} bytes each, "
                f"{wanted} in all; got {memory.nbytes}"
            )
        block = np.arange(spans[0] * spans[1]).reshape(spans)
        rows = memory.view(-1).view(layout.dtype).view(-1, layout.dim)
        numbers = memory.view(-1).view(torch.int32)
        words = layout.row_bytes // 4
        tracked = layout.tracks_received
        return cls(
            table,
            layers,
            rows[: -layout.slots],
            rows[layout.slots :],
            numbers[layout.positions.start * words :],
            numbers.view(torch.float32)[layout.received.start * words :] if tracked else None,
            block * layout.rows * (words - 1),
            QueryRing(rows, block * layout.rows + layout.ring.start, layout.queries, layout.query_heads),
            layout,
            block * layout.rows,
        )

    @property
    def is_lent(self) -> bool:
        """Whether the memory is an engine's."""
        return self._arena is not None

    @property
    def kv_bytes(self) -> int:
        """Bytes of key and value slots."""
        if self._arena is not None:
            return 2 * self._arena.slots * self._arena.row_bytes * self.shift.size
        return self.keys.nbytes + self.values.nbytes

    @property
    def index_bytes(self) -> int:
        """Bytes of everything kept per slot beside keys and values."""
        if self._arena is not None:
            return (4 + 4 * self._arena.tracks_received) * self._arena.slots * self.shift.size
        return self.positions.nbytes + (0 if self.received is None else self.received.nbytes)

    def local(self, layer: int) -> int:
        """Which of this pool's layers a layer is."""
        return layer - int(self.layers[0])

    def of_layer(self, layer: int) -> Pool:
        """One layer of it, the same memory, to be read."""
        one, local = copy.copy(self), self.local(layer)
        one.layers, one.shift = self.layers[local : local + 1], self.shift[local : local + 1]
        ring = self.queries
        one.queries = QueryRing(ring.memory, ring.base[local : local + 1], ring.size, ring.heads)
        return one

    # ---- reading ----

    def slots_of(self, rows: HostInts, width: int) -> Int[Tensor, "batch heads width"]:
        """The first ``width`` slots of each span, batch layer-major; past a span's end any slot."""
        starts = self.table.starts[self.layers[:, None], rows].reshape(-1, self.table.heads)
        at = torch.arange(width, device=self.keys.device)
        return (on_device(starts, self.keys.device)[..., None] + at).clamp_(max=max(len(self.keys) - 1, 0))

    def places_of(self, rows: HostInts, slots: Int[Tensor, "batch heads width"]) -> Int[Tensor, "batch heads width"]:
        """Where in ``positions`` and ``received`` the numbers of these slots are."""
        shift = self.shift[:, rows].reshape(-1)
        places = slots + on_device(shift, slots.device)[:, None, None]
        return places.clamp_(max=max(len(self.positions) - 1, 0))

    def positions_of(
        self, rows: HostInts, places: Int[Tensor, "batch heads width"]
    ) -> Int[Tensor, "batch heads width"]:
        """Positions of the first tokens of each span: stored for the settled ones, counted for the younger."""
        table, device = self.table, self.keys.device
        of = (self.layers[:, None], rows)
        first = (table.seen[rows][None, :, None] - table.lengths[of]).reshape(-1, table.heads)
        settled = on_device(table.settled[of].reshape(-1, table.heads), device)[..., None]
        at = torch.arange(places.shape[-1], device=device)
        stored = self.positions[places].long()
        return torch.where(at < settled, stored, on_device(first, device)[..., None] + at)

    # ---- writing ----

    def extend(
        self,
        layer: int,
        rows: HostInts,
        keys: Float[Tensor, "rows heads tokens dim"],
        values: Float[Tensor, "rows heads tokens value_dim"],
        counts: HostInts,
    ) -> None:
        """Add the first ``counts`` tokens of each row to its spans. There is room (``grow``)."""
        table, device = self.table, self.keys.device
        lengths = table.lengths[layer, rows]
        filled = np.broadcast_to(counts[:, None], lengths.shape)
        source, target = _runs(
            np.arange(lengths.size).reshape(lengths.shape) * keys.shape[2], table.starts[layer, rows] + lengths, filled
        )
        places = on_device(source, device)
        self.keys.index_copy_(0, on_device(target, device), keys.flatten(0, 2).index_select(0, places))
        self.values.index_copy_(0, on_device(target, device), values.flatten(0, 2).index_select(0, places))
        if self.received is not None:
            shift = np.repeat(self.shift[self.local(layer), rows], (filled.sum(1)))
            self.received.index_fill_(0, on_device(target + shift, device), 0.0)
        table.lengths[layer, rows] += counts[:, None]
        table.moves += 1

    def truncate(self, rows: HostInts, tokens: int) -> None:
        """Forget the newest ``tokens`` of every span of these rows."""
        self.table.lengths[self.layers[:, None], rows] -= tokens
        self.table.moves += 1

    def grow(self, capacities: HostInts) -> None:
        """Larger spans for all rows of an owned pool, same content. ``[layers, rows, heads]``."""
        table, layers, rows = self.table, self.layers, np.arange(self.table.rows)
        kept = table.lengths[layers]
        width = int(kept.max(initial=0))
        places = self.places_of(rows, self.slots_of(rows, width))
        stored = None if self.received is None else self.received[places]
        settled = table.settled[layers]
        tokens = Survivors(self.keys, self.values, table.starts[layers], kept, None, self.positions[places], stored)
        self.rewrite(rows, tokens, capacities)
        table.settled[layers] = settled

    def rewrite(self, rows: HostInts, tokens: Survivors, capacities: HostInts) -> None:
        """Lay out the spans of these rows anew, and fill them; in place where the number of slots does not change.

        Args:
            rows: all rows of an owned pool, any of a lent one.
            tokens: of this pool's layers and these rows.
            capacities: ``[layers, rows, heads]``, slots of the new spans.
        """
        table, device, heads = self.table, self.keys.device, self.table.heads
        of = (self.layers[:, None], rows)
        starts = self._arrange(rows, capacities)
        kept = tokens.kept.reshape(-1)
        count = int(kept.sum())
        first, stay, start = (on_device(x.reshape(-1), device) for x in (tokens.first, kept, starts))
        span = torch.repeat_interleave(torch.arange(len(kept), device=device), stay, output_size=count)
        at = torch.arange(count, device=device) - (stay.cumsum(0) - stay)[span]
        chosen = at if tokens.index is None else tokens.index.flatten()[span * tokens.index.shape[-1] + at]
        source, target = first[span] + chosen, start[span] + at
        slots = len(self.keys) if self.is_lent else int(capacities.sum())
        self.keys = _moved(self.keys, tokens.keys, source, target, slots)
        self.values = _moved(self.values, tokens.values, source, target, slots)
        shift = on_device(np.repeat(self.shift[:, rows].reshape(-1), heads), device)
        places = target + shift[span]
        for name, numbers in (("positions", tokens.positions), ("received", tokens.received)):
            memory = getattr(self, name)
            if memory is None:
                continue
            memory = memory if self.is_lent or len(memory) == slots else memory.new_empty(slots)
            if numbers is not None:
                stored = numbers.flatten()[span * numbers.shape[-1] + chosen].to(memory.dtype)
                memory.index_copy_(0, places, stored)
            setattr(self, name, memory)
        table.starts[of], table.lengths[of], table.capacities[of] = starts, tokens.kept, capacities
        table.settled[of] = tokens.kept if tokens.positions is not None else 0
        table.moves += 1

    def select(self, rows: Sequence[int], old: Table) -> None:
        """Keep, repeat and reorder the rows of an owned pool; ``old`` is a copy of the table before its ``select``."""
        index, layers = np.asarray(rows, dtype=np.int64), self.layers
        first = old.starts[layers, :, 0]
        last = first + old.capacities[layers].sum(-1)
        blocks = [slice(first[g, i], last[g, i]) for g in range(len(layers)) for i in rows]

        def pick(x: Tensor, blocks: list[slice]) -> Tensor:
            return torch.cat([x[block] for block in blocks]) if blocks else x[:0]

        self.keys, self.values, self.positions = (pick(x, blocks) for x in (self.keys, self.values, self.positions))
        self.received = None if self.received is None else pick(self.received, blocks)
        ring = self.queries
        size = ring.size * ring.heads
        queries = [slice(start, start + size) for start in ring.base[:, index].reshape(-1)]
        base = np.arange(len(layers) * len(rows)).reshape(len(layers), len(rows)) * size
        self.queries = QueryRing(pick(ring.memory, queries), base, ring.size, ring.heads)
        self.shift = self.shift[:, index]
        self.table.starts[layers] = self._arrange(np.arange(len(rows)), self.table.capacities[layers])

    def _arrange(self, rows: HostInts, capacities: HostInts) -> HostInts:
        """Where spans of these sizes begin: one behind the other, in a lent pool within each row's arena."""
        if self._base is None:
            ends = capacities.reshape(-1).cumsum()
            return (ends - capacities.reshape(-1)).reshape(capacities.shape)
        assert self._arena is not None
        ends = capacities.cumsum(-1)
        assert ends.max(initial=0) <= self._arena.slots, "spans outgrow their arena"
        return self._base[:, rows][..., None] + ends - capacities


def _moved(memory: Tensor, source: Tensor, places: Tensor, targets: Tensor, slots: int) -> Tensor:
    """``memory`` with whole tokens of ``source`` written into it; new memory where it must have other slots."""
    tokens = source.index_select(0, places)  # before anything is overwritten
    if len(memory) != slots:
        memory = memory.new_empty(slots, memory.shape[1])
    return memory.index_copy_(0, targets, tokens)


def _runs(first: HostInts, target: HostInts, counts: HostInts) -> tuple[HostInts, HostInts]:
    """``first[i], first[i] + 1, ...``, ``counts[i]`` of them, one run behind the other; and likewise ``target``."""
    counts = counts.reshape(-1)
    before = counts.cumsum() - counts
    along = np.arange(counts.sum())
    return tuple((x.reshape(-1) - before).repeat(counts) + along for x in (first, target))  # type: ignore[return-value]
