"""All arenas of a layer."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from reasonalloc.cache.arenas.layout import ArenaLayout
from reasonalloc.cache.arenas.table import ArenaTable
from reasonalloc.cache.spans import HostInts


class ArenaPool:
    """The memory of a layer's arenas, and the layer's part of the table.

    Slot ``i`` of arena ``a`` has its key in row ``a * layout.rows + i`` and its value ``layout.slots`` rows further
    on. So one pair of tensors serves requests in any arenas: all rows but the last ``layout.slots``, and all but the
    first.

    Attributes:
        layout: of each arena.
        rows: ``[arenas * layout.rows, dim]``, the memory.
        keys, values: the pair of tensors, views of it.
        starts, lengths, capacities, pushed, seen, steps: views of the ``ArenaTable``, without its dimension of layers.
        evicted, compressions: tokens forgotten over all heads and requests so far, and in how many rounds.
        kept: tokens per head that the last of these rounds left, on average.
    """

    def __init__(self, memory: Tensor, layout: ArenaLayout, table: ArenaTable, row: int) -> None:
        """Arenas in ``memory``: contiguous, of any dtype and shape; the first dimension counts them.

        Raises:
            ValueError: the memory's arenas are not as large as the layout's.
        """
        nbytes = memory[0].numel() * memory.element_size() if len(memory) else layout.nbytes
        if nbytes != layout.nbytes or not memory.is_contiguous():
            raise ValueError(f"arenas must be contiguous and of {layout.nbytes} bytes, got {nbytes} bytes")
        self.layout = layout
        self.rows = memory.view(-1).view(layout.dtype).view(-1, layout.dim)
        self.keys, self.values = self.rows[: -layout.slots], self.rows[layout.slots :]
        self.starts, self.lengths, self.capacities = table.starts[row], table.lengths[row], table.capacities[row]
        self.pushed, self.seen, self.steps = table.pushed[row], table.seen[row], table.steps[row]
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
