"""All layers of all requests: a step is prepared for all of them at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from torch import Tensor

from reasonalloc.cache.arenas.layer import ArenaLayer
from reasonalloc.cache.arenas.layout import ArenaLayout
from reasonalloc.cache.arenas.places import Places
from reasonalloc.cache.arenas.pool import ArenaPool
from reasonalloc.cache.arenas.table import ArenaTable
from reasonalloc.cache.attention import choose_backend
from reasonalloc.cache.spans import HostInts, Spans, on_device
from reasonalloc.cache.totals import LayerBudgets
from reasonalloc.policies.compression import Compression


class ArenaLayers:
    """The layers of a model, or of a pipeline's stage, in the order of their numbers.

    Between compressions all that happens to an arena's numbers is known beforehand. So where new tokens go is worked
    out on the host, for all layers, and sent to the device in one piece; what a layer does in a step is then three
    scatters and its attention.

    Attributes:
        layers: what an engine calls in the layers' forward passes, after ``begin_step``.
    """

    def __init__(
        self,
        compression: Compression,
        budgets: LayerBudgets,
        memory: Mapping[int, Tensor],
        layouts: Mapping[int, ArenaLayout],
        backend: str = "auto",
        patience: int = 1,
    ) -> None:
        """
        Args:
            compression, budgets: as for ``LayerCache``.
            memory: every layer's, by the layer's number; as for ``ArenaPool``, with equally many arenas.
            layouts: likewise; with equally many heads.
            backend: of attention.
            patience: a request whose prompt is staged has ended if it is absent for so many steps in a row: one, or
                as many as a pipeline has stages, whose requests take turns.
        """
        self.compression = compression
        numbers = sorted(memory)
        first = layouts[numbers[0]]
        self.device = memory[numbers[0]].device
        self.table = ArenaTable(len(numbers), len(memory[numbers[0]]), first.heads)
        pools = [ArenaPool(memory[number], layouts[number], self.table, row) for row, number in enumerate(numbers)]
        attention = choose_backend(backend, self.device, first.dtype, first.dim, compression.tracks_received)
        self.layers = [
            ArenaLayer(number, compression, budgets, pool, attention, patience)
            for number, pool in zip(numbers, pools, strict=True)
        ]
        self._rows = np.array([pool.layout.rows for pool in pools])
        self._ring = np.array([pool.layout.ring.start for pool in pools])
        self._queries, self._query_heads = first.queries, first.query_heads

    def begin_step(self, present: Collection[int], decoding: Sequence[int]) -> None:
        """Before the first layer of a step.

        Args:
            present: arenas of all requests that take part. The engine does not say that a request has ended; its
                prompt's memory, where it lies outside the arena, would be held until the arena is lent again.
            decoding: those that decode one token, their prompts being complete.
        """
        ended = [arena for arena in decoding if self.layers[0].requests[arena].in_prompt]  # and so in every layer
        for layer in self.layers:
            layer.give_back(present)
            layer.end_prompts(ended)
        index = np.asarray(decoding, dtype=np.int64)
        if not self.compression.tracks_received and len(index):
            self._make_room(index)
            self._prepare(index)

    def _make_room(self, index: HostInts) -> None:
        """A prompt that was not compressed may have filled some of its spans."""
        full = (self.table.lengths[:, index] == self.table.capacities[:, index]).any(-1)
        for row, i in np.argwhere(full).tolist():
            self.layers[row].requests[int(index[i])].make_even()

    def _prepare(self, index: HostInts) -> None:
        """Count the step, and tell every layer its places."""
        table = self.table
        starts, lengths, capacities = (x[:, index] for x in (table.starts, table.lengths, table.capacities))
        ring = self._rows[:, None] * index + self._ring[:, None]
        if self._queries:
            ring += table.pushed[:, index] % self._queries * self._query_heads
        ring_rows = ring[..., None] + np.arange(self._query_heads if self._queries else 0)
        new, lengths = starts + lengths, lengths + 1
        flat = [x.reshape(len(starts), -1) for x in (new, starts, lengths, ring_rows)]
        slots, first, live, rows = on_device(np.concatenate(flat, 1), self.device).split(
            [x.shape[1] for x in flat], dim=1
        )
        for counts in (table.lengths, table.pushed, table.seen, table.steps):
            counts[:, index] += 1
        due = index[table.steps[0, index] >= self.compression.interval].tolist()
        for i, layer in enumerate(self.layers):
            mirrored = first[i].view(starts.shape[1:]), live[i].view(starts.shape[1:])
            spans = Spans(layer.pool.keys, layer.pool.values, None, starts[i], lengths[i], capacities[i], mirrored)
            layer.places = Places(slots[i], rows[i], spans, due)
