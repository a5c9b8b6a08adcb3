"""All arenas of a layer."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from torch import Tensor

from reasonalloc.arenas.layout import ArenaLayout
from reasonalloc.storage import Spans
from reasonalloc.storage.spans import HostInts, on_device


class ArenaPool:
    """The memory of a layer's arenas, and what the host and the device know of their spans.

    Slot ``i`` of arena ``a`` has its key in row ``a * layout.rows + i`` and its value ``layout.slots`` rows further
    on. So one pair of tensors serves requests in any arenas: all rows but the last ``layout.slots``, and all but the
    first.

    Attributes:
        layout: of each arena.
        rows: ``[arenas * layout.rows, dim]``, the memory.
        starts, lengths, capacities: ``[arenas, heads]`` on the host: first row, live tokens and slots of every span.
        starts_device, lengths_device: the same on the device.
        pushed: ``[arenas]`` on the host: queries that went into every ring.
        evicted, compressions: tokens forgotten over all heads and requests so far, and in how many rounds.
        kept: tokens per head that the last of these rounds left, on average.
    """

    def __init__(self, memory: Tensor, layout: ArenaLayout) -> None:
        """Arenas in ``memory``: contiguous, of any dtype and shape; the first dimension counts them.

        Raises:
            ValueError: the memory's arenas are not as large as the layout's.
        """
        nbytes = memory[0].numel() * memory.element_size() if len(memory) else layout.nbytes
        if nbytes != layout.nbytes or not memory.is_contiguous():
            raise ValueError(f"arenas must be contiguous and of {layout.nbytes} bytes, got {nbytes} bytes")
        self.layout = layout
        self.rows = memory.view(-1).view(layout.dtype).view(-1, layout.dim)
        shape = (len(memory), layout.heads)
        self.starts, self.lengths, self.capacities = (np.zeros(shape, dtype=np.int64) for _ in range(3))
        self.starts_device = on_device(self.starts, memory.device)  # on the CPU: the same memory
        self.lengths_device = on_device(self.lengths, memory.device)
        self.pushed = np.zeros(len(memory), dtype=np.int64)
        self.evicted, self.compressions, self.kept = 0, 0, 0.0

    def arena(self, index: int) -> Float[Tensor, "rows dim"]:
        """The rows of one arena."""
        return self.rows[index * self.layout.rows : (index + 1) * self.layout.rows]

    def count_round(self, index: int, evicted: int) -> None:
        """A request forgot tokens."""
        self.evicted += evicted
        self.compressions += 1
        self.kept = float(self.lengths[index].mean())

    def place(self, index: int, starts: HostInts, lengths: HostInts, capacities: HostInts) -> None:
        """Write down one arena's spans; ``starts`` count from its first slot."""
        self.starts[index] = index * self.layout.rows + starts
        self.lengths[index], self.capacities[index] = lengths, capacities
        if self.rows.device.type != "cpu":
            self.starts_device[index] = on_device(self.starts[index], self.rows.device)
            self.lengths_device[index] = on_device(self.lengths[index], self.rows.device)

    def append(
        self,
        arenas: HostInts,
        keys: Float[Tensor, "batch heads 1 dim"],
        values: Float[Tensor, "batch heads 1 dim"],
        queries: Float[Tensor, "batch query_heads 1 dim"],
    ) -> Spans:
        """Add a token to each of several requests, and its query to their rings.

        Returns:
            Their spans, for attention. Accumulated attention is not part of them.
        """
        spans = Spans(
            self.rows[: -self.layout.slots],
            self.rows[self.layout.slots :],
            None,
            self.starts[arenas],
            self.lengths[arenas],
            self.capacities[arenas],
        )
        spans.append(keys, values)
        self.lengths[arenas] += 1
        if self.rows.device.type != "cpu":
            self.lengths_device[on_device(arenas, self.rows.device)] += 1
        self._remember(arenas, queries)
        return spans

    def _remember(self, arenas: HostInts, queries: Float[Tensor, "batch query_heads 1 dim"]) -> None:
        """One scatter for all requests."""
        layout = self.layout
        if not layout.queries:
            return
        first = arenas * layout.rows + layout.ring.start + self.pushed[arenas] % layout.queries * layout.query_heads
        rows = (first[:, None] + np.arange(layout.query_heads)).reshape(-1)
        self.rows.index_copy_(0, on_device(rows, self.rows.device), queries.reshape(-1, layout.dim))
        self.pushed[arenas] += 1
