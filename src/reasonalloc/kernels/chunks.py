"""Spans cut into chunks of equally many slots, one program each: unequal spans keep a whole GPU busy.

The table is made and filled where it is used, without a wait for the device, in a few operations for all layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

BEYOND = 1 << 30  # an offset behind every span's end


def most_chunks(slots: int, spans: int, chunk: int) -> int:
    """How many chunks so many spans have at most, however they share the slots. A span has at least one."""
    return slots // chunk + spans


@dataclass(frozen=True, eq=False)
class LayerChunks:
    """The chunks of one layer's spans, in the order of the spans.

    Attributes:
        rows: int32, the span that each chunk belongs to; 0 for a chunk that is not used.
        offsets: int32, its first slot, counted from the span's first one; ``BEYOND`` for a chunk that is not used.
        first: int32, the first chunk of each span, and the number of used chunks at the end.
        arrived: int32 zeros, for kernels that count a span's finished chunks and leave zeros behind.
        chunk: slots of one chunk.
    """

    rows: Int[Tensor, "most"]
    offsets: Int[Tensor, "most"]
    first: Int[Tensor, "spans_and_end"]
    arrived: Int[Tensor, "spans"]
    chunk: int


class ChunkTable:
    """The chunks of all layers. ``fill`` keeps every tensor where it is, as a CUDA graph needs it.

    Attributes:
        rows, offsets, first: as in ``LayerChunks``, for all layers.
        arrived: shared by the layers, which run one after the other.
        chunk: slots of one chunk.
    """

    def __init__(self, layers: int, spans: int, chunk: int, slots: int, device: torch.device) -> None:
        """No span has a slot before the first ``fill``.

        Args:
            layers: how many.
            spans: of each layer, at most.
            chunk: slots of one chunk.
            slots: that the spans of a layer share, at most.
            device: where the table lies.
        """
        numbers: dict[str, Any] = {"dtype": torch.int32, "device": device}
        self.chunk, self._slots, self._spans = chunk, slots, spans
        most = most_chunks(slots, spans, chunk)
        self.rows: Int[Tensor, "layers most"] = torch.zeros(layers, most, **numbers)
        self.offsets: Int[Tensor, "layers most"] = torch.full((layers, most), BEYOND, **numbers)
        self.first: Int[Tensor, "layers spans_and_end"] = torch.zeros(layers, spans + 1, **numbers)
        self.arrived: Int[Tensor, "spans"] = torch.zeros(spans, **numbers)
        self._numbers = torch.arange(most, **numbers).repeat(layers, 1)

    @classmethod
    def of(cls, capacities: Int[Tensor, "*layers rows heads"], chunk: int, slots: int) -> ChunkTable:
        """A table of these spans, on their device, which share so many slots in a layer at most."""
        spans = capacities.shape[-2] * capacities.shape[-1]
        table = cls(capacities.numel() // spans, spans, chunk, slots, capacities.device)
        table.fill(capacities)
        return table

    def fill(self, capacities: Int[Tensor, "*layers rows heads"]) -> None:
        """Cut spans of these capacities. They must not need more slots than there is room for.

        Fewer spans than the table is made for have a part of the slots that is as small: their rows' slots do not
        depend on one another (arenas).
        """
        layers = len(self.first)
        counts = (capacities.reshape(layers, -1) + (self.chunk - 1)) // self.chunk
        ends = counts.clamp_(min=1).cumsum(1, dtype=torch.int32)
        spans = ends.shape[1]
        self.first[:, 1 : spans + 1] = ends
        spans_of = torch.searchsorted(ends, self._numbers, right=True)
        unused = spans_of >= spans
        rows = spans_of.masked_fill_(unused, 0)
        offsets = (self._numbers - self.first.gather(1, rows)) * self.chunk
        self.rows.copy_(rows)
        self.offsets.copy_(offsets.masked_fill_(unused, BEYOND))

    def layer(self, layer: int, spans: int | None = None) -> LayerChunks:
        """One layer's part, or of its first ``spans`` alone: views, which later fills change."""
        count = self._spans if spans is None else spans
        most = most_chunks(self._slots * count // self._spans, count, self.chunk)
        rows, offsets = (x[layer, :most] for x in (self.rows, self.offsets))
        return LayerChunks(rows, offsets, self.first[layer, : count + 1], self.arrived[:count], self.chunk)
