"""The memory of a cache: slots for keys and values, and what is kept beside them."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from reasonalloc.cache import moving
from reasonalloc.cache.arena import ArenaLayout
from reasonalloc.cache.moving import Source, Survivors
from reasonalloc.cache.queries import QueryRing
from reasonalloc.cache.table import DeviceTable, HostInts, Table, on_device


class Pool:
    """Memory of some consecutive layers, for all rows.

    Every (layer, row) has a block of slots, in which the spans of its heads lie one behind the other. The memory is
    *owned*: allocated here, one block behind the other, row by row; or *lent*: equal blocks of an engine's memory
    (arenas). A slot is an index into ``keys`` and ``values``; the tables say where each span begins.

    Attributes:
        table, device: the numbers of all layers, on the host and where the keys are.
        layers: ``[layers]``, which of the table's layers lie here.
        keys, values: ``[slots, dim]`` in the model's dtype.
        positions: ``[places]`` int32, a settled token's index in its row's text.
        received: ``[places]`` float32, accumulated attention of every token, or None if it is not tracked.
        shift: ``[layers, rows]``, what leads from a row's slots to its places in ``positions`` and ``received``.
        base, sizes: ``[layers, rows]``, first slot and slots of each block.
        queries: the ring of last queries.
    """

    def __init__(
        self,
        table: Table,
        device: DeviceTable,
        layers: Sequence[int],
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        received: Tensor | None,
        shift: HostInts,
        base: HostInts,
        queries: QueryRing,
        arena: ArenaLayout | None = None,
    ) -> None:
        self.table, self.device, self.layers = table, device, np.array(layers, dtype=np.int64)
        self.keys, self.values, self.positions, self.received = keys, values, positions, received
        self.shift, self.base, self.queries, self._arena = shift, base, queries, arena
        self.sizes = np.full_like(base, 0 if arena is None else arena.slots)

    @classmethod
    def owned(
        cls,
        table: Table,
        device: DeviceTable,
        layers: Sequence[int],
        key: Float[Tensor, "rows heads tokens dim"],
        value: Float[Tensor, "rows heads tokens value_dim"],
        window: int,
        query_heads: int,
        track_received: bool,
    ) -> Pool:
        """An empty pool for tensors like these; the first rewrite makes its memory.

        Args:
            table, device, layers: as the attributes.
            key, value: of the model's width, dtype and device; their content is not read.
            window: last queries to remember.
            query_heads: of a layer.
            track_received: whether accumulated attention is kept.
        """
        spans = (len(layers), table.rows)
        ring = np.arange(spans[0] * spans[1]).reshape(spans) * window * query_heads
        memory = key.new_empty(ring.size * window * query_heads, key.shape[-1])
        return cls(
            table,
            device,
            layers,
            key.new_empty(0, key.shape[-1]),
            value.new_empty(0, value.shape[-1]),
            torch.empty(0, dtype=torch.int32, device=key.device),
            torch.empty(0, device=key.device) if track_received else None,
            np.zeros(spans, dtype=np.int64),
            np.zeros(spans, dtype=np.int64),
            QueryRing(memory, ring, window, query_heads),
        )

    @classmethod
    def lent(
        cls, table: Table, device: DeviceTable, layers: Sequence[int], memory: Tensor, layout: ArenaLayout
    ) -> Pool:
        """A pool in an engine's memory.

        Slot ``i`` of an arena has its key in row ``arena * layout.rows + i`` of the memory and its value
        ``layout.slots`` rows further on. So one pair of views serves all arenas: all rows but the last ``slots``, and
        all but the first.

        Args:
            table, device: one row for each arena.
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
            device,
            layers,
            rows[: -layout.slots],
            rows[layout.slots :],
            numbers[layout.positions.start * words :],
            numbers.view(torch.float32)[layout.received.start * words :] if tracked else None,
            block * layout.rows * (words - 1),
            block * layout.rows,
            QueryRing(rows, block * layout.rows + layout.ring.start, layout.queries, layout.query_heads),
            layout,
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

    @property
    def section(self) -> slice:
        """Its layers among the table's."""
        return slice(int(self.layers[0]), int(self.layers[-1]) + 1)

    def local(self, layer: int) -> int:
        """Which of this pool's layers a layer is."""
        return layer - int(self.layers[0])

    def of_layers(self, first: int, last: int) -> Pool:
        """Its layers ``first`` to ``last - 1``, counted within it; the same memory, to be read."""
        some, of = copy.copy(self), slice(first, last)
        some.layers, some.shift, some.base, some.sizes = self.layers[of], self.shift[of], self.base[of], self.sizes[of]
        ring = self.queries
        some.queries = QueryRing(ring.memory, ring.base[of], ring.size, ring.heads)
        return some

    # ---- reading ----

    def slots_of(self, rows: HostInts, width: int) -> Int[Tensor, "batch heads width"]:
        """The first ``width`` slots of each span, batch layer-major; past a span's end any slot."""
        starts = self.device.read("starts", self.section, rows).flatten(0, 1)
        at = torch.arange(width, device=self.keys.device)
        return (starts[..., None] + at).clamp_(max=max(len(self.keys) - 1, 0))

    def places_of(self, rows: HostInts) -> Int[Tensor, "layers rows heads"]:
        """Where in ``positions`` and ``received`` each span's numbers begin."""
        starts = self.device.read("starts", self.section, rows)
        return starts + on_device(self.shift[:, rows], starts.device)[..., None]

    def numbers_of(self, memory: Tensor, rows: HostInts, width: int) -> Shaped[Tensor, "batch heads width"]:
        """The first ``width`` of each span's ``positions`` or ``received``; past a span's end any."""
        at = torch.arange(width, device=memory.device)
        places = self.places_of(rows).flatten(0, 1)[..., None] + at
        return memory[places.clamp_(max=max(len(memory) - 1, 0))]

    def positions_of(self, rows: HostInts, width: int) -> Int[Tensor, "batch heads width"]:
        """Positions of the first tokens of each span: stored for the settled ones, counted for the younger."""
        settled = self.device.read("settled", self.section, rows).flatten(0, 1)[..., None]
        at = torch.arange(width, device=settled.device)
        counted = self.unsettled(rows).flatten(0, 1)[..., None] + at
        return torch.where(at < settled, self.numbers_of(self.positions, rows, width).long(), counted)

    def unsettled(self, rows: HostInts) -> Int[Tensor, "layers rows heads"]:
        """The position that a span's first token would have if none before its last had been forgotten."""
        lengths = self.device.read("lengths", self.section, rows)
        return on_device(self.table.seen[rows], lengths.device)[:, None] - lengths

    def source(self, rows: HostInts) -> Source:
        """These rows' tokens, where they lie."""
        first, settled = (self.device.read(name, self.section, rows) for name in ("starts", "settled"))
        return Source(self.keys, self.values, first, self.received, self.places_of(rows), settled, self.unsettled(rows))

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
        self._count(slice(layer, layer + 1), rows, counts)

    def truncate(self, rows: HostInts, tokens: int) -> None:
        """Forget the newest ``tokens`` of every span of these rows."""
        self._count(self.section, rows, np.full(len(rows), -tokens))

    def _count(self, layers: slice, rows: HostInts, tokens: HostInts) -> None:
        self.table.young[layers, rows] += tokens
        self.device.add(layers, rows, tokens)

    def grow(self, capacities: HostInts) -> None:
        """Larger spans for all rows of an owned pool, same content. ``[layers, rows, heads]``."""
        table, rows = self.table, np.arange(self.table.rows)
        kept, settled = (self.device.read(name, self.section, rows) for name in ("lengths", "settled"))
        lengths, held = table.lengths[self.layers], table.settled[self.layers]
        tokens = Survivors(self.source(rows), kept, int(lengths.sum()), int(lengths.max(initial=0)))
        self.rewrite(rows, tokens, on_device(capacities, kept.device), capacities.sum(-1), settled)
        self.note(rows, capacities, held)

    def rewrite(
        self,
        rows: HostInts,
        tokens: Survivors,
        capacities: Int[Tensor, "layers rows heads"],
        sizes: HostInts,
        settled: Int[Tensor, "layers rows heads"],
    ) -> None:
        """Lay out the spans of these rows anew, and fill them, without waiting for the device; ``note`` tells the host.

        In place where the blocks stay as large as they are; otherwise an owned pool gets new memory.

        Args:
            rows: all rows of an owned pool, any of a lent one.
            tokens: of this pool's layers and these rows.
            capacities: slots of the new spans.
            sizes: ``[layers, rows]``, the sum of ``capacities`` over heads, which the host knows.
            settled: how many of the tokens in each span have their position stored, afterwards.
        """
        move, segment = moving.begin(tokens), self._resize(rows, sizes)
        slots = len(self.keys) if self.is_lent else int(sizes.sum())
        starts = on_device(self.base[:, rows], capacities.device)[..., None] + capacities.cumsum(-1) - capacities
        places = starts + on_device(self.shift[:, rows], starts.device)[..., None]
        self.keys, self.values = move.tokens((self.keys, self.values), starts, slots, segment)
        self.positions = move.positions(self.positions, places, len(self.positions) if self.is_lent else slots)
        if self.received is not None:
            self.received = move.received(self.received, places, len(self.received) if self.is_lent else slots)
        self.device.write(
            self.section, rows, starts=starts, capacities=capacities, lengths=tokens.kept, settled=settled
        )
        self.table.moves += 1

    def lay_out(self, capacities: HostInts) -> None:
        """Spans of all rows, which are empty: ``[layers, rows, heads]``. Nothing is written into them."""
        rows, none = np.arange(self.table.rows), np.zeros_like(capacities)
        self.note(rows, capacities, none)
        starts = self.table.starts[self.layers]
        spans = {"starts": starts, "capacities": capacities}
        self.device.write(self.section, rows, **{name: on_device(x, self.keys.device) for name, x in spans.items()})

    def note(self, rows: HostInts, capacities: HostInts, settled: HostInts) -> None:
        """What the host's table says of spans that were rewritten: ``[layers, rows, heads]``."""
        starts = self.base[:, rows][..., None] + capacities.cumsum(-1) - capacities
        assert self._arena is None or capacities.sum(-1).max(initial=0) <= self._arena.slots, "spans outgrow an arena"
        self.table.place(self.layers, rows, starts, capacities, settled)

    def select(self, rows: Sequence[int]) -> None:
        """Keep, repeat and reorder the rows of an owned pool; the table has them already."""
        index = np.asarray(rows, dtype=np.int64)
        first, last = self.base[0], self.base[-1] + self.sizes[-1]
        blocks = [slice(first[i], last[i]) for i in rows]

        def pick(x: Tensor, blocks: list[slice]) -> Tensor:
            return torch.cat([x[block] for block in blocks]) if blocks else x[:0]

        self.keys, self.values, self.positions = (pick(x, blocks) for x in (self.keys, self.values, self.positions))
        self.received = None if self.received is None else pick(self.received, blocks)
        ring = self.queries
        size = ring.size * ring.heads
        queries = [slice(start, start + size) for start in ring.base[:, index].reshape(-1)]
        at = np.arange(len(self.layers) * len(rows)).reshape(len(self.layers), len(rows)) * size
        self.queries = QueryRing(pick(ring.memory, queries), at, ring.size, ring.heads)
        self.shift, self.sizes = self.shift[:, index], self.sizes[:, index]
        self.base = _one_behind_the_other(self.sizes)
        capacities = self.table.capacities[self.layers]
        starts = self.base[..., None] + capacities.cumsum(-1) - capacities
        self.table.place(self.layers, np.arange(len(rows)), starts, capacities, self.table.settled[self.layers])
        self.device.write(self.section, np.arange(len(rows)), starts=on_device(starts, self.keys.device))

    def _resize(self, rows: HostInts, sizes: HostInts) -> int | None:
        """Set the blocks' sizes. Of how many consecutive spans the slots stay the same ones; None: of none."""
        layers, _ = self.sizes.shape
        if self.is_lent or np.array_equal(sizes, self.sizes):
            return self.table.heads
        rows_stay = np.array_equal(sizes.sum(0), self.sizes.sum(0))
        self.sizes, self.base = sizes, _one_behind_the_other(sizes)
        return layers * self.table.heads if rows_stay else None


def _one_behind_the_other(sizes: HostInts) -> HostInts:
    """First slots of blocks of these sizes, row by row: ``[layers, rows]``."""
    by_row = np.ascontiguousarray(sizes.T).reshape(-1)
    return np.ascontiguousarray((by_row.cumsum() - by_row).reshape(sizes.T.shape).T)


def _runs(first: HostInts, target: HostInts, counts: HostInts) -> tuple[HostInts, HostInts]:
    """``first[i], first[i] + 1, ...``, ``counts[i]`` of them, one run behind the other; and likewise ``target``."""
    counts = counts.reshape(-1)
    before = counts.cumsum() - counts
    along = np.arange(counts.sum())
    return tuple((x.reshape(-1) - before).repeat(counts) + along for x in (first, target))  # type: ignore[return-value]
